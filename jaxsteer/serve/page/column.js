// One column: what its model is, and its chat.

import {button, fillSelect, make} from "./elements.js";
import {colourTokens} from "./colour.js";
import {BOUNDS, KINDS, OPERATIONS, PLACES, nameOf, settingOf, short} from "./session.js";

const FINISHED = {stop: "", length: "cut by length", cancelled: "stopped", timeout: "out of time", content_filter: "cut"};

export class Column {
  /** act: what the page does on behalf of a column: changed, used, load, remove, again, rerun, editUser, editReply. */
  constructor(column, offered, act) {
    this.column = column;
    this.offered = offered;
    this.act = act;
    this.turns = [];  // {element, asked, answer, words, facts, shown}, one for each turn
    this.kind = make("select", {className: "kind", onchange: () => this.change({kind: this.kind.value}, true)});
    this.kind.setAttribute("aria-label", "What this column’s model is");
    this.name = make("input", {className: "name", maxLength: 60, oninput: () => this.change({name: this.name.value.trim()}), "aria-label": "Name of the column"});
    this.remover = button("×", () => act.remove(column.id), {className: "quiet remove", "aria-label": "Remove the column"});
    this.state = make("div", {className: "state"});
    this.system = make("textarea", {rows: 2, value: column.system, oninput: () => this.change({system: this.system.value}), placeholder: "You are …"});
    this.more = make("details", {open: !!column.system},
      make("summary", {textContent: "System message"}), make("label", {className: "field"}, make("span", {className: "hidden", textContent: "System message, or a role"}), this.system));
    this.staleness = make("div", {className: "stale", hidden: true}, make("span", {textContent: "Set differently since these replies."}),
      button("Answer again", () => act.rerun(column.id)));
    this.log = make("div", {className: "log", role: "log", "aria-live": "off", tabIndex: 0, onscroll: () => this.remember()});
    this.element = make("section", {className: "column"},
      make("div", {className: "head"}, make("div", {className: "line"}, this.kind, this.name, this.remover), this.state, this.more, this.staleness), this.log);
    this.follows = true;
    this.controls();
  }

  /** Change the setting. `whole`: other controls are needed. */
  change(changes, whole = false) {
    if ("kind" in changes || "vector" in changes) this.column.bound = "";
    if ("kind" in changes) this.column.vector = "";  // a cap is no vector
    Object.assign(this.column, changes);
    if (whole) this.controls();
    this.title();
    this.act.changed(this.column.id);
  }

  /** The place among the columns, which gives the colour. */
  place(index, removable) {
    this.element.className = `column c${index}`;
    this.remover.disabled = !removable;
    this.title();
  }

  title() {
    const name = nameOf(this.column);
    if (document.activeElement !== this.name) this.name.value = this.column.name;
    this.name.title = name;
    this.name.placeholder = name === KINDS[this.column.kind] ? "name" : name;
    this.element.setAttribute("aria-label", `Column: ${name}`);
    this.log.setAttribute("aria-label", `Chat of ${name}`);
  }

  // What the model is

  controls() {
    const {column, offered} = this, made = [];
    const {files} = offered;
    const can = kind => ({vector: offered.vectors.length + files.length, cap: offered.caps.length + offered.vectors.length + files.length, latents: offered.saes.length}[kind] ?? 1);
    const kinds = Object.entries(KINDS).filter(([kind]) => can(kind) || kind === column.kind);
    fillSelect(this.kind, kinds, column.kind);
    if (column.kind === "vector") made.push(...this.vectorControls());
    if (column.kind === "cap") made.push(...this.capControls());
    if (column.kind === "latents") made.push(...this.latentControls());
    if (column.kind === "prompt") made.push(...this.promptControls());
    this.state.replaceChildren(...made);
    if (this.system.value !== column.system) this.system.value = column.system;
    this.more.open ||= !!column.system;
  }

  /** Take the first of what is offered, where nothing was chosen. */
  choose(some) {
    if (this.column.vector || !some.length) return;
    const one = some.find(each => !this.act.used(each.name)) ?? some[0];
    Object.assign(this.column, {vector: one.name, strength: one.strength});
  }

  pick(what, some) {
    const {files} = this.offered, select = make("select", {onchange: () => {
      if (select.value.startsWith("load ")) { this.act.load(this.column.id, select.value.slice(5)); return; }
      const one = some.find(each => each.name === select.value);
      this.change({vector: select.value, strength: one ? one.strength : this.column.strength}, true);
    }, "aria-label": what});
    const names = some.map(one => [one.name, one.name]), known = some.some(one => one.name === this.column.vector);
    const missing = [this.column.vector, this.column.vector ? `${this.column.vector} (not loaded)` : "choose …"];
    const more = files.length ? [{label: "Files of the server", options: files.map(file => [`load ${file}`, file])}] : [];
    fillSelect(select, [...known ? [] : [missing], ...names, ...more], this.column.vector);
    return select;
  }

  vectorControls() {
    const {column, offered} = this;
    this.choose(offered.vectors);
    const one = offered.vectors.find(each => each.name === column.vector), reach = 4 * Math.abs(one?.strength || 1);
    const slider = this.slider("strength", "Strength", -reach, reach, one ? ` ${one.units}` : "");
    return [this.pick("Vector", offered.vectors), slider, note(one ? one.about : "Choose a vector of the server.")];
  }

  capControls() {
    const {column, offered} = this, some = [...offered.caps, ...offered.vectors];
    this.choose(some);
    const one = some.find(each => each.name === column.vector);
    if (!one || one.cap) {
      column.bound = "";
      return [this.pick("Cap", some), note(one ? one.about : "Choose a cap, or a vector to be bounded.")];
    }
    const {low, high, usual} = one.reach;
    if (!column.bound) Object.assign(column, {bound: "floor", value: usual});
    const bound = make("select", {onchange: () => this.change({bound: bound.value}, true), "aria-label": "Kind of bound"});
    fillSelect(bound, Object.entries(BOUNDS), column.bound);
    return [this.pick("Vector to be bounded", some), make("div", {className: "line wrap"}, bound, this.slider("value", "Bound", low, high, "")),
      note(`Keeps the projection ${column.bound === "floor" ? "at or above" : "at or below"} this, at every token but the first, at ${one.site ?? `${one.sites.length} sites`}. ${one.sign}`)];
  }

  latentControls() {
    const {column, offered} = this;
    const field = make("input", {value: column.latents.join(", "), placeholder: "471, 12", "aria-label": "Numbers of latents", oninput: () => {
      const latents = readLatents(field.value);
      field.setCustomValidity(latents ? "" : "Expected numbers of latents, like 471, 12");
      if (latents) this.change({latents});
      else field.reportValidity();
    }});
    const operation = make("select", {onchange: () => this.change({operation: operation.value}), "aria-label": "What becomes of the latents"});
    fillSelect(operation, Object.entries(OPERATIONS), column.operation);
    return [make("div", {className: "line wrap"}, field, operation), this.slider("amount", "Amount", 0, 10, ""), note(offered.saes[0]?.about ?? "The server has no SAE.")];
  }

  /** A slider and a number for one field of the column. */
  slider(field, what, low, high, units) {
    const {column} = this;
    const slider = make("input", {type: "range", min: low, max: high, step: stepOf(high - low), value: column[field], "aria-label": what});
    const exact = make("input", {type: "number", step: "any", value: column[field], "aria-label": `${what}, as a number`});
    const take = value => {
      if (!Number.isFinite(value)) return;
      this.change({[field]: value});
      slider.setAttribute("aria-valuetext", short(value) + units);
    };
    slider.addEventListener("input", () => { exact.value = slider.value; take(slider.valueAsNumber); });
    exact.addEventListener("input", () => { slider.value = exact.value; take(exact.valueAsNumber); });
    slider.setAttribute("aria-valuetext", short(column[field]) + units);
    return make("div", {className: "strength"}, slider, exact);
  }

  promptControls() {
    const {column} = this;
    const field = make("textarea", {rows: 2, value: column.prompt, placeholder: "A prompt that a search has found, or any words",
      oninput: () => this.change({prompt: field.value}), "aria-label": "Prompt"});
    const place = make("select", {onchange: () => this.change({place: place.value}), "aria-label": "Where the prompt stands"});
    fillSelect(place, Object.entries(PLACES), column.place);
    return [field, place];
  }

  // The chat

  /** Show the turns of a session. */
  show(session, colours) {
    const {turns} = session;
    while (this.turns.length > turns.length) this.turns.pop().element.remove();
    if (!turns.length) this.log.replaceChildren(make("p", {className: "empty", textContent: "Nothing has been said yet. What you write below goes to every column; each answers with a history of its own."}));
    else if (!this.turns.length) this.log.replaceChildren();
    turns.forEach((turn, k) => {
      if (k === this.turns.length) this.turns.push(this.makeTurn(k));
      this.showTurn(this.turns[k], turn, k, k === turns.length - 1, colours);
    });
    const setting = settingOf(this.column);
    this.staleness.hidden = !turns.some(turn => {
      const reply = turn.replies[this.column.id];
      return reply && reply.setting !== setting && !reply.writing;
    });
    this.scroll();
  }

  makeTurn(k) {
    const said = make("div", {className: "words"}), words = make("div", {className: "words"}), facts = make("span", {className: "facts"});
    const failed = make("div", {className: "failed", hidden: true});
    const again = button("Again", () => this.act.again(this.column.id, k), {className: "quiet", title: "Answer this turn again with the next seed"});
    const edit = button("Edit", () => this.edit(k, false), {className: "quiet", title: "Change this reply; later turns go"});
    const ask = button("Edit", () => this.edit(k, true), {className: "quiet", title: "Change the message; all columns answer it again"});
    ask.setAttribute("aria-label", `Edit message ${k + 1}`);
    again.setAttribute("aria-label", `Answer turn ${k + 1} again`);
    edit.setAttribute("aria-label", `Edit reply ${k + 1}`);
    const asked = make("div", {className: "asked"}, ask, said), answer = make("div", {className: "answer"}, words, failed);
    const element = make("article", {className: "turn"}, asked, answer, make("div", {className: "tools"}, facts, again, edit));
    element.dataset.turn = k;
    element.setAttribute("aria-label", `Turn ${k + 1}`);
    this.log.append(element);
    return {element, asked, answer, said, words, facts, failed, again, edit, ask};
  }

  showTurn(made, turn, k, last, colours) {
    const reply = turn.replies[this.column.id];
    if (made.said.textContent !== turn.user) made.said.textContent = turn.user;
    made.answer.classList.toggle("writing", !!reply?.writing);
    const curve = reply && !reply.writing && colours.on ? reply.read : null;
    if (curve?.each.length) colourTokens(made.words, reply.text, curve, colours.scale, colours.format);
    else made.words.textContent = reply?.text ?? "";
    made.failed.hidden = !reply?.error;
    made.failed.textContent = reply?.error ?? "";
    made.facts.textContent = reply ? factsOf(reply) : "waiting";
    made.again.hidden = made.edit.hidden = !reply || reply.writing;
    made.ask.hidden = !reply || reply.writing;
  }

  /** A piece of the reply that is being written. */
  append(k, piece) {
    this.turns[k]?.words.append(piece);
    this.scroll();
  }

  edit(k, asks) {
    const made = this.turns[k], target = asks ? made.said : made.words, before = target.textContent;
    const field = make("textarea", {value: before, "aria-label": asks ? "The message" : "The reply"});
    const close = () => { box.remove(); target.hidden = false; made.ask.focus(); };
    const save = () => {
      close();
      if (field.value !== before && (field.value.trim() || !asks)) this.act[asks ? "editUser" : "editReply"](this.column.id, k, field.value);
    };
    const box = make("div", {}, field, make("div", {className: "row"}, button(asks ? "Send again" : "Keep", save), button("Cancel", close)));
    field.addEventListener("keydown", event => {
      if (event.key === "Escape") { event.stopPropagation(); close(); }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
    });
    box.style.flex = "1";
    target.hidden = true;
    target.after(box);
    field.focus();
  }

  // Scrolling: to the newest words, unless somebody has scrolled away from them

  remember() {
    this.follows = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
  }

  scroll() {
    if (this.follows) this.log.scrollTo({top: this.log.scrollHeight, behavior: "instant"});
  }

  /** Scroll the chat to a turn, and show it for a moment. */
  seek(k) {
    const made = this.turns[k];
    if (!made) return;
    this.follows = k === this.turns.length - 1;
    this.log.scrollTo({top: made.element.offsetTop - this.log.offsetTop - 8});
    made.element.classList.remove("seen");
    void made.element.offsetWidth;  // so that the animation begins again
    made.element.classList.add("seen");
  }
}

function factsOf(reply) {
  const parts = [];
  if (reply.writing) parts.push(reply.queued ? "waiting for a row" : "writing");
  if (reply.read) parts.push(`projection ${short(reply.read.mean)}`);
  if (reply.steered && reply.read && reply.steered.mean !== reply.read.mean) parts.push(`steered ${short(reply.steered.mean)}`);
  if (FINISHED[reply.finish]) parts.push(FINISHED[reply.finish]);
  if (reply.edited) parts.push("edited");
  if (reply.applied?.gate_open === false) parts.push("gate closed: not steered");
  return parts.join(" · ");
}

/** Numbers of latents of a text like "471, 12"; null where it is none. */
export function readLatents(words) {
  const parts = words.split(/[\s,;#]+/).filter(Boolean);
  return parts.every(part => /^\d+$/.test(part)) ? parts.map(Number) : null;
}

/** A round step of about a two-hundredth of what the slider spans. */
export function stepOf(reach) {
  const power = 10 ** Math.floor(Math.log10(reach / 100));
  return power * [1, 2, 5, 10].find(factor => factor * power >= reach / 200);
}

function note(words) {
  return make("p", {className: "note", textContent: words, title: words});
}
