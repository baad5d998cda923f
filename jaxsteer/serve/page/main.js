// The page: one message, several columns, a plot between them.

import {Column} from "./column.js";
import {Conversation} from "./conversation.js";
import {scaleOf} from "./colour.js";
import {byId, button, fillSelect, make} from "./elements.js";
import {drawPlot, writeTable} from "./plot.js";
import {MOST_COLUMNS, LEAST_COLUMNS, clip, freeId, fromFragment, nameOf, newColumn, newSession, nextOfScript, short} from "./session.js";
import * as server from "./server.js";
import {wireDialogs} from "./dialogs.js";

const page = {
  session: newSession(), offered: {model: "", vectors: [], caps: [], saes: [], files: [], along: []}, presets: null,
  columns: new Map(),  // Column by id
  shown: {tokens: false, read: true, steered: false, colour: false},
};
const conversation = new Conversation(page, {render, piece: (id, k, words) => page.columns.get(id)?.append(k, words), say, problem});

// Columns

function placeColumns() {
  const {session, columns, offered} = page, main = byId("columns"), plot = byId("plot");
  for (const [id, column] of columns) {
    if (session.columns.some(one => one === column.column)) continue;
    column.element.remove();
    columns.delete(id);
  }
  session.columns.forEach((one, i) => {
    if (!columns.has(one.id)) columns.set(one.id, new Column(one, offered, act));
    const column = columns.get(one.id), before = i === 0 ? plot : null;
    if (i === 0 ? column.element.nextElementSibling !== plot : main.children[i + 1] !== column.element) main.insertBefore(column.element, before);
    column.place(i, session.columns.length > LEAST_COLUMNS);
  });
  main.style.setProperty("--n", session.columns.length);
  byId("add").disabled = session.columns.length >= MOST_COLUMNS;
}

const act = {
  used: name => page.session.columns.some(column => column.vector === name),
  changed: id => { page.columns.get(id).show(page.session, coloursNow()); drawSoon(); },
  load,
  remove: id => {
    conversation.stop(id);
    page.session.columns = page.session.columns.filter(column => column.id !== id);
    page.session.turns.forEach(turn => { delete turn.replies[id]; });
    render();
  },
  again: (id, k) => conversation.again(id, k),
  rerun: id => conversation.rerun(id),
  editUser: (id, k, words) => conversation.editUser(k, words),
  editReply: (id, k, words) => conversation.editReply(id, k, words),
};

/** Load a file of the server for a column. */
async function load(id, name) {
  const column = page.columns.get(id), {session, offered} = page;
  try {
    Object.assign(offered, await server.load(name));
    problem("");
    const cap = offered.caps.find(one => one.name === name), one = cap ?? offered.vectors.find(each => each.name === name);
    if (!one) problem(`${name} is loaded, but it can neither be added nor cap: ask for it by code.`);
    else column.change({kind: cap || column.column.kind === "cap" ? "cap" : "vector"}), column.change({vector: name, strength: one.strength}, true);
  } catch (error) {
    problem(error.message);
  }
  for (const each of page.columns.values()) each.controls();
  chooseAlong(session.along, session.site);
  render();
}

function addColumn() {
  const {session, offered} = page, id = freeId(session.columns);
  const kind = offered.vectors.length ? "vector" : "plain";
  session.columns.push(newColumn(id, {kind}));
  render();
  const column = page.columns.get(id);
  column.element.scrollIntoView({inline: "start"});
  column.kind.focus();
  conversation.catchUp();
}

// What is shown

function render() {
  const {session, columns} = page, colours = coloursNow();
  placeColumns();
  for (const column of columns.values()) column.show(session, colours);
  draw();
  const busy = conversation.busy;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("undo").disabled = busy || !conversation.canUndo;
  byId("clear").disabled = busy || !session.turns.length;
  byId("starters").hidden = session.turns.length > 0 || !!session.script;
  showScript(busy);
}

function showScript(busy) {
  const {script} = page.session, next = nextOfScript(page.session);
  byId("script").hidden = !script;
  if (!script) return;
  byId("script-name").textContent = script.name;
  byId("script-next").textContent = next === undefined ? "All has been said." : `${script.messages.indexOf(next) + 1} of ${script.messages.length}: ${next}`;
  byId("script-next").title = next ?? "";
  byId("script-send").disabled = byId("script-all").disabled = busy || next === undefined;
}

function curvesNow() {
  const {session} = page, along = server.alongKey(session);
  return session.columns.map((column, i) => ({
    colour: `c${i}`, name: nameOf(column),
    points: session.turns.flatMap((turn, k) => {
      const reply = turn.replies[column.id], fits = one => one?.along === along ? one : null;
      return reply ? [{turn: k, words: reply.text, read: fits(reply.read), steered: fits(reply.steered)}] : [];
    }),
  }));
}

function coloursNow() {
  const {shown} = page;
  if (!shown.colour) return {on: false};
  const values = page.session.turns.flatMap(turn => Object.values(turn.replies).flatMap(reply => reply.read?.each ?? []));
  const scale = scaleOf(values);
  byId("scale-low").textContent = short(scale.middle - scale.reach);
  byId("scale-high").textContent = short(scale.middle + scale.reach);
  return {on: true, scale, format: value => `projection ${short(value)}`};
}

let drawing = 0;
function drawSoon() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(draw);
}

function draw() {
  const {session, offered, shown} = page, curves = curvesNow(), along = offered.along.find(one => one.name === session.along);
  const marks = along ? [...along.marks(session.site), ...boundsOn(along)] : [];
  const nothing = offered.along.length ? "Replies appear here as points, one turn below the other."
    : "The server holds no vector to project on. Start it with --axis FILE or --steer FILE and there is one.";
  drawPlot(byId("drawing"), curves, {...shown, nothing}, marks, {
    choose: k => { for (const column of page.columns.values()) column.seek(k); },
    show: showTip, hide: () => { byId("tip").hidden = true; },
  });
  writeTable(byId("table"), curves);
  byId("legend").replaceChildren(...curves.map(curve => make("li", {className: curve.colour, textContent: curve.name})));
  byId("low").textContent = along ? `← ${along.low}` : "";
  byId("high").textContent = along ? `${along.high} →` : "";
  byId("where").textContent = along ? ` of ${along.name}, read at ${session.site}` : "";
  byId("unit").textContent = along ? `In units of the stream.${along.sign ? ` Up is: ${along.sign}.` : ""}` : "";
  byId("scale").hidden = !shown.colour;
}

function showTip(event, curve, point) {
  const tip = byId("tip"), at = event.currentTarget.getBoundingClientRect();
  const numbers = [point.read && `words ${short(point.read.mean)}`, point.steered && `stream ${short(point.steered.mean)}`].filter(Boolean).join(" · ");
  tip.replaceChildren(make("b", {textContent: `${curve.name}, turn ${point.turn + 1}`}), numbers, make("p", {className: "muted", textContent: clip(point.words, 120)}));
  tip.hidden = false;
  const left = event.clientX || at.right, top = event.clientY || at.bottom;
  tip.style.left = `${Math.max(8, Math.min(left + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(8, Math.min(top + 14, innerHeight - tip.offsetHeight - 8))}px`;
}

function say(words) {
  byId("announce").textContent = words;
}

function problem(words) {
  const element = byId("problem");
  element.hidden = !words;
  element.textContent = words;
}

// The message

const said = byId("said");

function grow() {
  said.style.height = "auto";
  said.style.height = `${said.scrollHeight + 2}px`;
}

function send(event) {
  event?.preventDefault();
  const words = said.value.trim();
  if (!words || conversation.busy) return;
  said.value = "";
  grow();
  conversation.send(words);
}

function take(session, keepOffered = true) {
  conversation.stop();
  for (const column of page.columns.values()) column.element.remove();
  page.columns.clear();
  page.session = session;
  session.model = page.offered.model;
  chooseAlong(session.along, session.site);
  conversation.forget();
  render();
}

/** What is projected on: a vector, and a site of it. */
function chooseAlong(name, site) {
  const {session, offered: {along}} = page, one = along.find(each => each.name === name) ?? along[0], sites = one?.sites ?? [];
  session.along = one?.name ?? "";
  session.site = sites.includes(site) ? site : one?.site ?? "";
  fillSelect(byId("along"), along.length ? along.map(each => [each.name, each.name]) : [["", "nothing here"]], session.along);
  fillSelect(byId("site"), sites.map(each => [each, each.replace(/^blocks\.(\d+)\.hook_resid_post$/, "after block $1")]), session.site);
  byId("site").hidden = sites.length < 2;
}

/** The caps of columns on what is projected on, and its own. */
function boundsOn(along) {
  const {session: {columns, site}} = page, own = columns.filter(column => column.kind === "cap" && column.bound && column.vector === along.name);
  const values = new Set([...own.map(column => column.value), ...site in along.caps ? [along.caps[site]] : []]);
  return [...values].map(value => ({value, name: "cap"}));
}

function starters() {
  const {presets} = page, box = byId("starters");
  if (!presets) return;
  const picks = [["conversation", presets.conversations.slice(-2)], ["role", presets.roles.slice(0, 2)], ["attack", presets.attacks.slice(0, 2)]];
  box.replaceChildren(make("span", {textContent: "Try:"}), ...picks.flatMap(([kind, some]) => some.map(one => button(one.name, () => usePreset(kind, one), {title: one.about}))),
    button("more …", () => byId("presets-dialog").showModal()));
}

/** A conversation becomes the script, a role the last column's system message, an attack the message that is being written. */
function usePreset(kind, one) {
  const {session} = page;
  if (kind === "conversation") session.script = {name: one.name, messages: one.messages, from: session.turns.length};
  if (kind === "role") {
    const last = session.columns.at(-1);
    Object.assign(last, {system: one.system, name: last.name || one.name});
    page.columns.get(last.id).controls();
    page.columns.get(last.id).title();
    page.columns.get(last.id).more.open = true;
  }
  if (kind === "attack") {
    said.value = one.message;
  }
  render();
  grow();
  if (kind !== "conversation") said.focus(); else byId("script-all").focus();
}

// Begin

function wire() {
  byId("composer").addEventListener("submit", send);
  said.addEventListener("input", grow);
  said.addEventListener("keydown", event => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event); });
  byId("stop").addEventListener("click", () => conversation.stop());
  byId("undo").addEventListener("click", () => conversation.undo());
  byId("clear").addEventListener("click", () => conversation.clear());
  byId("add").addEventListener("click", addColumn);
  byId("script-send").addEventListener("click", () => conversation.play(1));
  byId("script-all").addEventListener("click", () => conversation.play(Infinity));
  byId("script-end").addEventListener("click", () => { page.session.script = null; render(); said.focus(); });
  for (const id of ["along", "site"]) {
    byId(id).addEventListener("change", () => { chooseAlong(byId("along").value, byId("site").value); render(); conversation.projectAll(); });
  }
  for (const [id, tokens] of [["by-turn", false], ["by-token", true]]) {
    byId(id).addEventListener("click", () => {
      page.shown.tokens = tokens;
      byId("by-turn").setAttribute("aria-pressed", String(!tokens));
      byId("by-token").setAttribute("aria-pressed", String(tokens));
      draw();
    });
  }
  for (const [id, name] of [["show-read", "read"], ["show-steered", "steered"], ["colour", "colour"]]) {
    byId(id).checked = page.shown[name];
    byId(id).addEventListener("change", event => { page.shown[name] = event.target.checked; render(); });
  }
  document.addEventListener("keydown", event => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName), dialog = document.querySelector("dialog[open]");
    if (dialog) return;
    if (event.key === "Escape") conversation.stop();
    else if (typing) return;
    else if (event.key === "/") { event.preventDefault(); said.focus(); }
    else if (event.key === "?") byId("help-dialog").showModal();
    else if (event.key === "z" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); conversation.undo(); }
  });
  const wide = matchMedia("(min-width: 761px)"), fold = () => { byId("plot-foot").open = wide.matches; };
  wide.addEventListener("change", fold);
  fold();
  new ResizeObserver(drawSoon).observe(byId("drawing"));
  addEventListener("hashchange", () => open(location.hash));
}

/** The session of a link, where it is one. */
function open(fragment) {
  try {
    const session = fromFragment(fragment);
    if (session) {
      take(session);
      history.replaceState(null, "", location.pathname);
      if (session.turns.length) conversation.catchUp();
    }
    return !!session;
  } catch (error) {
    problem(error.message);
    return false;
  }
}

async function begin() {
  wire();
  wireDialogs(page, conversation, {take, usePreset, render, problem, connect});
  await connect();
  try {
    page.presets = await server.presets();
    byId("preset-list").dispatchEvent(new Event("presets"));
    starters();
  } catch (error) {
    problem(error.message);
  }
}

/** Ask the server what it holds, and begin a session with it. */
async function connect() {
  try {
    await server.ready(what => { byId("model").textContent = `compiling ${what} …`; });
    Object.assign(page.offered, await server.describe());
    problem("");
  } catch (error) {
    byId("model").textContent = "not connected";
    problem(error.message);
  }
  byId("model").textContent = page.offered.model || "not connected";
  if (open(location.hash) || page.session.turns.length) return;
  const session = newSession(), last = session.columns[1], {vectors, caps} = page.offered;
  if (vectors.length) Object.assign(last, {kind: "vector", vector: vectors[0].name, strength: vectors[0].strength});
  else if (caps.length) Object.assign(last, {kind: "cap", vector: caps[0].name});
  take(session);
}

begin();
