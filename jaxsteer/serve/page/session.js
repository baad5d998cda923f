// What the page shows, as data: columns, settings, turns. Files and links hold it, and are checked here before they are taken.
//
// A session: {format, model, along, site, settings, columns, turns, script}; along and site say what is projected on.
// The script: {name, messages, from}, from is the number of turns before it began.
// A column: what its model is. A turn: what the user said, and the reply of each column by its id.

export const FORMAT = "jaxsteer.chat/1";
export const KINDS = {
  plain: "Plain model", vector: "Vector", cap: "Cap", latents: "Latents", prompt: "Prompt",
};
export const OPERATIONS = {amplify: "times", calibrate: "set to"};  // what becomes of latents
export const BOUNDS = {floor: "at least", ceiling: "at most"};  // of a cap of one's own
export const PLACES = {before: "before the message", after: "after the message", system: "as system message"};
export const MOST_COLUMNS = 4, LEAST_COLUMNS = 2;
const LONGEST = 100000, MOST_TURNS = 200, MOST_LATENTS = 64;

export const SETTINGS = {
  temperature: {value: 0.7, low: 0, high: 2},
  top_p: {value: 1, low: 0.01, high: 1},
  max_tokens: {value: 160, low: 1, high: 4096, whole: true},
  seed: {value: 1, low: 0, high: 2147483647, whole: true},
};

export function newColumn(id, changes = {}) {
  return {
    id, name: "", kind: "plain", system: "", vector: "", strength: 1, bound: "", value: 0, latents: [], operation: "amplify", amount: 2,
    prompt: "", place: "before", ...changes,
  };
}

export function newSession() {
  return {
    format: FORMAT, model: "", along: "", site: "",
    settings: Object.fromEntries(Object.entries(SETTINGS).map(([name, one]) => [name, one.value])),
    columns: [newColumn("a"), newColumn("b")], turns: [], script: null,
  };
}

/** The first id of a to z that no column has. */
export function freeId(columns) {
  return [..."abcdefghijklmnopqrstuvwxyz"].find(id => !columns.some(column => column.id === id));
}

/** How a column is called: its own name, else what it is. */
export function nameOf(column) {
  if (column.name) return column.name;
  const vector = stem(column.vector);
  if (column.kind === "vector") return vector ? `${vector} × ${short(column.strength)}` : "Vector";
  if (column.kind === "cap") return !vector ? "Cap" : column.bound ? `${vector} ${BOUNDS[column.bound]} ${short(column.value)}` : `${vector}, capped`;
  if (column.kind === "latents") {
    return column.latents.length ? `#${column.latents.join(" #")} ${column.operation === "amplify" ? "×" : "="} ${short(column.amount)}` : "Latents";
  }
  if (column.kind === "prompt") return column.prompt ? `“${clip(column.prompt, 24)}”` : "Prompt";
  return column.system ? `“${clip(column.system, 24)}”` : KINDS.plain;
}

/** A file's name without its suffix. */
export function stem(name) {
  return name.replace(/\.(safetensors|gguf|svec|npy|pt)$/, "");
}

/** What of a column changes its replies. A reply remembers it. */
export function settingOf(column) {
  const {kind, system, vector, strength, bound, value, latents, operation, amount, prompt, place} = column;
  return JSON.stringify({
    plain: [kind, system], vector: [kind, system, vector, strength], cap: [kind, system, vector, bound, ...bound ? [value] : []],
    latents: [kind, system, latents, operation, amount], prompt: [kind, system, prompt, place],
  }[kind]);
}

/** The messages that stand before reply `k` of a column. Prompts are put into the user's messages, or before them. */
export function messagesOf(session, column, k) {
  const messages = [], prompted = column.kind === "prompt" && column.prompt;
  const system = [column.system, prompted && column.place === "system" ? column.prompt : ""].filter(Boolean).join("\n");
  if (system) messages.push({role: "system", content: system});
  for (let i = 0; i <= k; i++) {
    const said = session.turns[i].user;
    let content = said;
    if (prompted && column.place === "before") content = `${column.prompt} ${said}`;
    if (prompted && column.place === "after") content = `${said} ${column.prompt}`;
    messages.push({role: "user", content});
    const reply = session.turns[i].replies[column.id];
    if (i < k && reply) messages.push({role: "assistant", content: reply.text});
  }
  return messages;
}

/** Number of the first turn that a column has not answered; the number of turns where it has answered all. */
export function nextTurn(session, column) {
  const k = session.turns.findIndex(turn => !turn.replies[column.id]);
  return k < 0 ? session.turns.length : k;
}

/** The message of the script that comes next; undefined where there is none. */
export function nextOfScript({script, turns}) {
  return script?.messages[Math.max(0, turns.length - script.from)];
}

// Files and links

/** A session of parsed JSON. Throws an Error that says what is wrong with it. */
export function readSession(data) {
  const one = object(data, "the file");
  if (one.format !== FORMAT) throw new Error(`This is no conversation of this page: its format is ${show(one.format)}, expected “${FORMAT}”.`);
  const session = newSession();
  session.model = text(one.model ?? "", "model");
  session.along = text(one.along ?? "", "along");
  session.site = text(one.site ?? "", "site");
  const settings = object(one.settings ?? {}, "settings");
  for (const [name, range] of Object.entries(SETTINGS)) {
    if (name in settings) session.settings[name] = number(settings[name], name, range);
  }
  const columns = list(one.columns, "columns", MOST_COLUMNS);
  if (columns.length < LEAST_COLUMNS) throw new Error(`The conversation has ${columns.length} columns, expected ${LEAST_COLUMNS} to ${MOST_COLUMNS}.`);
  session.columns = columns.map(readColumn);
  const ids = session.columns.map(column => column.id);
  if (new Set(ids).size < ids.length) throw new Error("Two columns have one id.");
  session.turns = list(one.turns ?? [], "turns", MOST_TURNS).map(turn => readTurn(turn, ids));
  if (one.script) {
    const script = object(one.script, "script");
    session.script = {name: text(script.name ?? "", "name"), messages: list(script.messages, "messages", MOST_TURNS).map(each => text(each, "a message")),
      from: number(script.from ?? 0, "from", {low: 0, whole: true})};
  }
  return session;
}

function readColumn(data) {
  const one = object(data, "a column"), column = newColumn(text(one.id, "id"));
  if (!/^[a-z]$/.test(column.id)) throw new Error(`A column’s id is ${show(one.id)}, expected a letter from a to z.`);
  for (const name of ["name", "system", "vector", "prompt"]) column[name] = text(one[name] ?? "", name);
  column.kind = oneOf(one.kind ?? "plain", KINDS, "kind");
  column.place = oneOf(one.place ?? "before", PLACES, "place");
  column.operation = oneOf(one.operation ?? "amplify", OPERATIONS, "operation");
  column.bound = one.bound ? oneOf(one.bound, BOUNDS, "bound") : "";
  column.value = number(one.value ?? 0, "value", {});
  column.strength = number(one.strength ?? 1, "strength", {});
  column.amount = number(one.amount ?? 2, "amount", {});
  column.latents = list(one.latents ?? [], "latents", MOST_LATENTS).map(each => number(each, "a latent", {low: 0, whole: true}));
  return column;
}

function readTurn(data, ids) {
  const one = object(data, "a turn"), replies = object(one.replies ?? {}, "replies"), turn = {user: text(one.user, "user"), replies: {}};
  for (const id of ids) {
    if (!Object.hasOwn(replies, id)) continue;
    const reply = object(replies[id], "a reply");
    turn.replies[id] = {
      text: text(reply.text, "text"), finish: text(reply.finish ?? "", "finish"), setting: text(reply.setting ?? "", "setting"),
      seed: number(reply.seed ?? 0, "seed", {low: 0, whole: true}), edited: reply.edited === true, error: text(reply.error ?? "", "error"),
      applied: typeof reply.applied === "object" ? reply.applied : null,
      read: readCurve(reply.read), steered: readCurve(reply.steered),
    };
  }
  return turn;
}

/** A projection: {along, mean, pieces, each}; null for none. */
function readCurve(data) {
  if (data === null || data === undefined) return null;
  const one = object(data, "a projection"), pieces = list(one.pieces ?? [], "pieces", LONGEST), each = list(one.each ?? [], "each", LONGEST);
  if (pieces.length !== each.length) throw new Error(`A projection has ${pieces.length} tokens and ${each.length} values.`);
  return {
    along: text(one.along ?? "", "along"), mean: number(one.mean, "mean", {}),
    pieces: pieces.map(piece => text(piece, "a token")), each: each.map(value => number(value, "a projection", {})),
  };
}

/** The session without what was answered, as the fragment of a link. */
export function toFragment(session) {
  const asked = session.turns.map(turn => ({user: turn.user}));
  const bytes = new TextEncoder().encode(JSON.stringify({...session, turns: asked}));
  let binary = "";
  for (const byte of bytes) binary += String.fromCharCode(byte);
  return "s=" + btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

/** The session of a fragment; null where it holds none. Throws an Error for a damaged one. */
export function fromFragment(fragment) {
  const found = /^#?s=([A-Za-z0-9_-]+)$/.exec(fragment);
  if (!found) return null;
  let data;
  try {
    const binary = atob(found[1].replaceAll("-", "+").replaceAll("_", "/"));
    data = JSON.parse(new TextDecoder("utf-8", {fatal: true}).decode(Uint8Array.from(binary, c => c.charCodeAt(0))));
  } catch {
    throw new Error("The link is damaged: it was cut off or changed on the way.");
  }
  return readSession(data);
}

// Checks

function object(data, what) {
  if (typeof data !== "object" || data === null || Array.isArray(data)) throw new Error(`${what} is ${show(data)}, expected an object.`);
  return data;
}

function list(data, what, most) {
  if (!Array.isArray(data)) throw new Error(`${what} is ${show(data)}, expected a list.`);
  if (data.length > most) throw new Error(`${what} has ${data.length} entries, at most ${most} can be.`);
  return data;
}

function text(data, what) {
  if (typeof data !== "string") throw new Error(`${what} is ${show(data)}, expected a text.`);
  if (data.length > LONGEST) throw new Error(`${what} has ${data.length} letters, at most ${LONGEST} can be.`);
  return data;
}

function number(data, what, {low = -1e9, high = 1e9, whole = false}) {
  if (typeof data !== "number" || !Number.isFinite(data) || data < low || data > high || (whole && !Number.isInteger(data))) {
    throw new Error(`${what} is ${show(data)}, expected a ${whole ? "whole " : ""}number from ${low} to ${high}.`);
  }
  return data;
}

function oneOf(data, known, what) {
  if (typeof data !== "string" || !Object.hasOwn(known, data)) throw new Error(`${what} is ${show(data)}, expected one of ${Object.keys(known).join(", ")}.`);
  return data;
}

function show(data) {
  return data === undefined ? "missing" : clip(JSON.stringify(data), 60);
}

/** A text of at most so many letters. */
export function clip(words, most) {
  const one = words.replace(/\s+/g, " ").trim();
  return one.length > most ? one.slice(0, most - 1).trimEnd() + "…" : one;
}

/** A number with three significant digits. */
export function short(value) {
  if (!Number.isFinite(value)) return "–";
  const digits = Number(value.toPrecision(3));
  return Math.abs(digits) >= 1e5 || (digits && Math.abs(digits) < 1e-3) ? digits.toExponential(1) : String(digits).replace("-", "−");
}
