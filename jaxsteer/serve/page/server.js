// All that is asked of the server. Other modules know nothing of its paths and forms.

import {short, stem} from "./session.js";

let key = sessionStorage.getItem("jaxsteer-key") ?? "";
let steersAll = false;  // whether the server steers requests that do not say how
export const ORIGIN = location.origin;

export function setKey(words) {
  key = words;
  sessionStorage.setItem("jaxsteer-key", key);
}

export const getKey = () => key;

/** What went wrong, in the server's words. */
export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, body, signal) {
  const headers = key ? {Authorization: `Bearer ${key}`} : {};
  const options = body === undefined ? {headers} : {method: "POST", headers: {...headers, "Content-Type": "application/json"}, body: JSON.stringify(body)};
  let answer;
  try {
    answer = await fetch(path, {...options, signal});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer: it was stopped, or the connection is gone.", 0);
  }
  if (answer.ok) return answer;
  let message = `${answer.status} ${answer.statusText}`;
  try {
    message = (await answer.json()).error.message;
  } catch { /* no error of the usual form */ }
  throw new Refusal(answer.status === 401 ? "This server asks for a key: write it into Settings." : message, answer.status);
}

const CAPS = ["floor", "ceiling", "clamp"], ADDED = ["add", "add_keep_norm", "ablate"];
const UNITS = {vector: "times the vector", mean_resid_norm: "mean norms of the stream"};

/** The model and what it can be steered by and projected on. */
export async function describe() {
  const [models, held] = await Promise.all(["v1/models", "v1/steering"].map(async path => (await ask(path)).json()));
  steersAll = held.active;
  const named = held.data.map(one => ({...one, cap: CAPS.includes(one.operation), strength: one.coefficient ?? 1, units: UNITS[one.units] ?? one.units}))
    .map(one => ({...one, about: aboutOf(one), reach: reachOf(one)}));
  return {
    model: models.data[0].id,
    vectors: named.filter(one => ADDED.includes(one.operation)), caps: named.filter(one => one.cap),
    files: held.files.filter(name => !held.data.some(one => one.name === name)),
    along: alongOf(named), saes: held.sae ? [{about: `${held.sae.latents} latents at ${held.sae.site}`}] : [],
  };
}

/** Load a file of the server's directory, and say what there is then. */
export async function load(name) {
  await ask("v1/steering/load", {name});
  return describe();
}

/** What a vector is, in a line. */
function aboutOf(one) {
  const sites = one.site ? [one.site] : one.sites;
  const where = sites.length === 1 ? sites[0] : `${sites.length} sites, ${sites[0]} to ${sites.at(-1)}`;
  const how = one.cap ? `${one.operation} at ${where}` : `${one.operation} at ${where}; ${short(one.strength)} ${one.units} by default`;
  return [one.sign, how, one.gate ? "behind a gate" : ""].filter(Boolean).join(". ");
}

/** Where a bound on the projection makes sense: around roles and Assistant, where the file knows them, else within the stream's norm. */
function reachOf(one) {
  const site = one.site ?? one.sites[Math.floor(one.sites.length / 2)], scale = one.scale?.[site];
  if (scale) {
    const {roles, default: own} = scale, wide = Math.abs(own - roles);
    return {low: Math.min(roles, own) - wide, high: Math.max(roles, own) + wide, usual: one.calibration?.[site]?.["25"] ?? own};
  }
  const norm = one.mean_resid_norm[site] ?? 4 * one.norms[site];
  return {low: -norm, high: norm, usual: 0};
}

/** Directions that can be projected on, the axis first. */
function alongOf(named) {
  const fits = named.filter(one => one.cap || ADDED.includes(one.operation));
  return fits.sort((one, other) => other.axis - one.axis).map(one => ({
    name: one.name, sign: one.sign, low: one.axis ? "other characters" : "away", high: one.axis ? "the Assistant" : stem(one.name),
    sites: one.sites, site: one.site ?? one.sites[Math.floor(one.sites.length / 2)], caps: one.values, marks: site => marksOf(one, site),
  }));
}

/** The body of a request for the next reply of a column. */
export function bodyOf(session, column, messages, seed) {
  const {temperature, top_p, max_tokens} = session.settings;
  const body = {model: session.model, messages, temperature, top_p, max_tokens, seed};
  const steering = askedOf(column);
  if (steering) body.steering = steering;
  return body;
}

/** What steers a column, as a request says it; null for nothing. */
export function steeringOf(column) {
  if (column.kind === "vector" && column.vector) return {edits: [{vector: column.vector, coefficient: column.strength}]};
  if (column.kind === "cap" && column.vector) {
    return {edits: [{vector: column.vector, ...column.bound ? {operation: column.bound, value: column.value} : {}}]};
  }
  if (column.kind === "latents" && column.latents.length) return {edits: [{latents: column.latents, operation: column.operation, amount: column.amount}]};
  return null;
}

/** The field `steering` of a request. A server that steers every request is told to leave these as their columns say. */
export function askedOf(column) {
  const own = steeringOf(column);
  return steersAll ? {...own ?? {edits: []}, merge: false} : own;
}

/** Stream a reply: `piece` is called with every new piece of text. Returns {finish, applied}. */
export async function stream(body, piece, signal) {
  const answer = await ask("v1/chat/completions", {...body, stream: true}, signal);
  let finish = "", applied = null, done = false;
  for await (const data of eventsOf(answer.body)) {
    if (data === "[DONE]") { done = true; break; }
    const event = JSON.parse(data);
    if (event.error) throw new Refusal(event.error.message, 500);
    applied = event.x_jaxsteer ?? applied;
    const choice = event.choices?.[0];
    if (choice?.delta?.content) piece(choice.delta.content);
    finish = choice?.finish_reason ?? finish;
  }
  if (!done && !finish) throw new Refusal("The connection ended before the reply did.", 0);
  if (body.steering?.edits.length && !applied?.edits.length) throw new Refusal("The server did not say that it steered this reply.", 0);
  return {finish, applied};
}

/** The data of server-sent events. */
export async function* eventsOf(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "", data = [];
  try {
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, {stream: true})).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Projections of the assistant's messages of a conversation on the direction of the session, by number of the message.
 *
 * {read, steered}: read is the model without edits, steered with the column's; null where the column has none. Each is
 * {along, mean, pieces, each}. */
export async function project(session, messages, column, signal) {
  const steering = askedOf(column), body = {messages, vectors: [session.along], sites: [session.site]};
  if (steering?.edits.length) body.steering = steering;
  const found = await (await ask("v1/project", body, signal)).json(), [result] = found.results, along = alongKey(session), replies = {};
  for (const {turn, role, along: mean, along_edited: edited} of result.turns) {
    if (role !== "assistant") continue;
    const own = found.tokens.flatMap((token, i) => token.turn === turn && token.role === "assistant" ? [i] : []);
    const pieces = own.map(i => found.tokens[i].text), curve = (mean, values) => ({along, mean, pieces, each: own.map(i => values[i])});
    replies[turn] = {read: curve(mean, result.along), steered: edited === null ? null : curve(edited, result.along_edited)};
  }
  return replies;
}

/** Places along a vector at a site that its file knows. */
function marksOf(one, site) {
  const scale = one.scale?.[site];
  return scale ? [{value: scale.roles, name: "roles"}, {value: scale.default, name: "Assistant"}] : [];
}

/** What a projection is on. */
export const alongKey = session => `${session.along} @ ${session.site}`;

/** Wait until the server has compiled its programs; `tell` is called with what it does. */
export async function ready(tell) {
  for (;;) {
    const answer = await fetch("health").catch(() => { throw new Refusal("The server does not answer: it was stopped, or the connection is gone.", 0); });
    if (answer.ok) return;
    const {compiling} = await answer.json().catch(() => ({}));
    tell(compiling || "its programs");
    await new Promise(resolve => setTimeout(resolve, 1500));
  }
}

/** The presets that ship with the page. */
export async function presets() {
  return (await ask("page/presets.json")).json();
}
