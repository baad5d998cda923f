// Tokens of a reply as spans of its text, coloured by their projection.

/** Where each piece stands in the text: [from, to], in order, with the white space before it.
 *
 * Pieces are tokens decoded one by one, so that a space before a word may be missing and a character of several tokens is none.
 * What cannot be found belongs to the next piece that can. */
export function spansOf(words, pieces) {
  const spans = [];
  let at = 0;
  for (const piece of pieces) {
    const bare = piece.trim();
    let from = bare && !bare.includes("\ufffd") ? words.indexOf(bare, at) : -1;
    if (!bare && piece) from = words.startsWith(piece, at) ? at : -1;
    if (from < 0 || from - at > 24) { spans.push([at, at]); continue; }
    const to = from + (bare ? bare.length : piece.length);
    spans.push([at, to]);
    at = to;
  }
  return spans;
}

/** The middle and the reach of values: colours end at the 95th percentile of the distance from the median. */
export function scaleOf(values) {
  if (!values.length) return {middle: 0, reach: 1};
  const middle = quantile(values, 0.5);
  return {middle, reach: quantile(values.map(value => Math.abs(value - middle)), 0.95) || 1};
}

export function quantile(values, q) {
  const sorted = [...values].sort((a, b) => a - b), at = q * (sorted.length - 1), low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

/** Fill an element with the text, one span per token. */
export function colourTokens(element, words, curve, scale, format) {
  const spans = spansOf(words, curve.pieces), parts = [];
  let end = 0;
  spans.forEach(([from, to], i) => {
    if (to <= from) return;
    const whole = words.slice(from, to), bare = whole.trimStart(), space = whole.slice(0, whole.length - bare.length);
    const span = document.createElement("span"), value = curve.each[i];
    const share = Math.max(-1, Math.min(1, (value - scale.middle) / scale.reach));
    span.className = "token";
    span.textContent = bare;
    span.title = format(value);
    span.style.backgroundColor = `rgba(var(--${share < 0 ? "down" : "up"}), ${(0.5 * Math.abs(share)).toFixed(3)})`;
    parts.push(space, span);
    end = to;
  });
  element.replaceChildren(...parts, words.slice(end));
}
