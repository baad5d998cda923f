// The plot between the chats: projection to the right, turns going down. One curve for each column.

import {short, clip} from "./session.js";

const NS = "http://www.w3.org/2000/svg";
const LEFT = 26, RIGHT = 16, TOP = 20, BOTTOM = 8;
const ROWS = 4, ROW = 46, TOKEN_ROW = 84, FLAT_ROW = 26;

/** Draw curves into an element.
 *
 * curves: [{colour, name, points: [{turn, words, read, steered, writing}]}], read and steered are {mean, each, pieces} or null.
 * shown: {read, steered, tokens}. marks: [{value, name}], vertical lines. act: {choose(turn), show(event, rows), hide()}. */
export function drawPlot(element, curves, shown, marks, act) {
  const kinds = ["read", "steered"].filter(kind => shown[kind]);
  const drawn = curves.map(curve => ({...curve, points: curve.points.filter(point => kinds.some(kind => point[kind]))}));
  const values = drawn.flatMap(({points}) => points.flatMap(point => kinds.flatMap(kind => valuesOf(point[kind], shown.tokens))));
  if (!values.length) {
    const nothing = document.createElement("p");
    nothing.className = "nothing";
    nothing.textContent = shown.nothing;
    element.replaceChildren(nothing);
    return;
  }
  const width = Math.max(element.clientWidth, 160), flat = innerWidth <= 760;
  const turns = Math.max(flat ? 2 : ROWS, ...drawn.flatMap(({points}) => points.map(point => point.turn + 1)));
  const row = shown.tokens ? TOKEN_ROW : flat ? FLAT_ROW : ROW, height = TOP + turns * row + BOTTOM;
  const near = marks.filter(mark => inReach(mark.value, values));
  const ticks = ticksOf(Math.min(...values, ...near.map(mark => mark.value)), Math.max(...values, ...near.map(mark => mark.value)), width < 260 ? 3 : 5);
  const low = ticks[0], high = ticks.at(-1);
  const x = value => LEFT + (width - LEFT - RIGHT) * (value - low) / (high - low);
  const y = (turn, share = 0.5) => TOP + (turn + share) * row;

  const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": "Plot: one point per reply"});
  for (let turn = 0; turn < turns; turn++) {
    if (turn % 2 === 0) svg.append(make("rect", {class: "band", x: 0, y: y(turn, 0), width, height: row, rx: 3}));
    svg.append(label(String(turn + 1), 6, y(turn) + 4, "start"));
  }
  for (const tick of ticks) {
    svg.append(make("line", {class: tick === 0 ? "zero" : "grid", x1: x(tick), x2: x(tick), y1: TOP, y2: height - BOTTOM}));
    svg.append(label(short(tick), x(tick), 12, "middle"));
  }
  near.sort((one, other) => one.value - other.value).forEach((mark, i) => {
    svg.append(make("line", {class: "zero", x1: x(mark.value), x2: x(mark.value), y1: TOP, y2: height - BOTTOM}));
    const end = x(mark.value) > width - 60;
    svg.append(label(mark.name, x(mark.value) + (end ? -3 : 3), height - BOTTOM - 3 - 12 * (i % 3), end ? "end" : "start"));
  });
  // Curves that coincide stay visible: the first column's is the widest and lies below.
  drawn.forEach((curve, i) => svg.append(curveOf({...curve, more: drawn.length - 1 - i}, kinds, shown.tokens, x, y, act)));
  element.replaceChildren(svg);
}

function curveOf(curve, kinds, tokens, x, y, act) {
  const group = make("g", {class: curve.colour}), last = curve.points.at(-1);
  for (const kind of kinds) {
    const points = curve.points.filter(point => point[kind]), dashed = kind === "steered" ? " steered" : "";
    if (tokens) {
      for (const point of points) {
        const n = point[kind].each.length;
        const path = point[kind].each.map((value, i) => `${x(value).toFixed(1)},${y(point.turn, 0.06 + 0.88 * (i + 0.5) / n).toFixed(1)}`);
        group.append(make("polyline", {class: "line thin" + dashed, points: path.join(" ")}));
      }
    }
    group.append(make("polyline", {class: "line" + dashed, "stroke-width": 1.8 + 1.3 * curve.more, points: points.map(point => `${x(point[kind].mean).toFixed(1)},${y(point.turn)}`).join(" ")}));
  }
  for (const point of curve.points) group.append(pointOf(curve, point, point === last, kinds, x, y, act));
  return group;
}

function pointOf(curve, point, last, kinds, x, y, act) {
  const numbers = kinds.filter(kind => point[kind]).map(kind => `${kind === "read" ? "words" : "stream"} ${short(point[kind].mean)}`).join(", ");
  const group = make("g", {
    class: "point" + (last ? " last" : ""), tabindex: "0", role: "button", "data-turn": point.turn,
    "aria-label": `${curve.name}, turn ${point.turn + 1}: ${numbers}. ${clip(point.words, 120)}`,
  });
  for (const kind of kinds.filter(one => point[one])) {
    const at = {cx: x(point[kind].mean), cy: y(point.turn)};
    if (last && kind === kinds[0]) group.append(make("circle", {class: "halo", r: 11, ...at}));
    group.append(make("circle", {class: "reach", r: 13, ...at}), make("circle", {class: kind === "read" ? "dot" : "hollow", r: 4.5 + 1.4 * curve.more, ...at}));
  }
  const show = event => act.show(event, curve, point);
  group.addEventListener("pointerenter", show);
  group.addEventListener("pointermove", show);
  group.addEventListener("pointerleave", act.hide);
  group.addEventListener("focus", show);
  group.addEventListener("blur", act.hide);
  group.addEventListener("click", () => act.choose(point.turn));
  group.addEventListener("keydown", event => {
    if (event.key === "Enter" || event.key === " ") act.choose(point.turn);
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const all = [...group.ownerSVGElement.querySelectorAll(".point")];
      all[all.indexOf(group) + (event.key === "ArrowDown" ? 1 : -1)]?.focus();
    } else return;
    event.preventDefault();
  });
  return group;
}

/** A table of all means, for those who read rather than look. */
export function writeTable(table, curves) {
  const head = document.createElement("tr"), body = [];
  head.append(cell("th", "turn"));
  for (const curve of curves) head.append(cell("th", `${curve.name}: words`), cell("th", "stream"));
  const turns = Math.max(0, ...curves.flatMap(({points}) => points.map(point => point.turn + 1)));
  for (let turn = 0; turn < turns; turn++) {
    const row = document.createElement("tr");
    row.append(cell("th", String(turn + 1)));
    for (const curve of curves) {
      const point = curve.points.find(one => one.turn === turn);
      for (const kind of ["read", "steered"]) row.append(cell("td", point?.[kind] ? short(point[kind].mean) : "–"));
    }
    body.push(row);
  }
  table.replaceChildren(head, ...body);
}

/** Round numbers from below the least to above the largest value, about so many. */
export function ticksOf(least, most, count) {
  const spread = most - least || Math.abs(most) || 1, rough = spread / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find(factor => factor * power >= rough * 0.999);
  const from = Math.floor((least - 0.04 * spread) / step), to = Math.ceil((most + 0.04 * spread) / step);
  return Array.from({length: to - from + 1}, (_, i) => Number(((from + i) * step).toPrecision(12)));
}

/** Whether a mark is near enough to the values to be drawn without pressing them together. */
function inReach(value, values) {
  const least = Math.min(...values), most = Math.max(...values), spread = most - least || Math.abs(most) || 1;
  return value > least - spread && value < most + spread;
}

function valuesOf(curve, tokens) {
  return curve ? [curve.mean, ...(tokens ? curve.each : [])] : [];
}

function label(words, x, y, anchor) {
  const element = make("text", {x, y, "text-anchor": anchor});
  element.textContent = words;
  return element;
}

function cell(tag, words) {
  const element = document.createElement(tag);
  element.textContent = words;
  return element;
}

function make(tag, attributes) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
