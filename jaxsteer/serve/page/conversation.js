// What happens in the chats: sending, answering, stopping, undoing; and the projections that follow.

import * as server from "./server.js";
import {messagesOf, nameOf, nextOfScript, nextTurn, settingOf, clip} from "./session.js";

const STEPS = 40;  // that can be undone
const PEEK = 1500, SLOW = 800;  // milliseconds: a reply is projected while it is written, unless that is slow

export class Conversation {
  /** page holds the session. view: {render(), piece(id, k, words), say(words), problem(words)}. */
  constructor(page, view) {
    this.page = page;
    this.view = view;
    this.past = [];
    this.running = new Map();  // AbortController by column's id
    this.projecting = new Map();
    this.took = 0;
    this.playing = 0;
  }

  get busy() { return this.running.size > 0; }

  get canUndo() { return this.past.length > 0; }

  forget() { this.past = []; }

  /** Remember the turns, before they change. */
  keep() {
    const {turns} = this.page.session;
    this.past.push(structuredClone(turns));
    if (this.past.length > STEPS) this.past.shift();
  }

  undo() {
    if (this.busy || !this.past.length) return;
    this.page.session.turns = this.past.pop();
    this.view.render();
    this.view.say("Undone.");
  }

  clear() {
    if (this.busy || !this.page.session.turns.length) return;
    this.keep();
    this.page.session.turns = [];
    this.view.render();
  }

  /** Send a message to all columns. */
  async send(words) {
    this.keep();
    this.page.session.turns.push({user: words, replies: {}});
    await this.catchUp();
  }

  /** Send messages of the script, one after another. */
  async play(count) {
    this.playing = count;
    while (this.playing > 0) {
      const {session} = this.page, next = nextOfScript(session);
      if (next === undefined || this.busy) break;
      this.playing--;
      await this.send(next);
      if (session.turns.some(turn => Object.values(turn.replies).some(reply => reply.error))) break;
    }
    this.playing = 0;
  }

  /** Let every column answer what it has not answered. */
  async catchUp() {
    await Promise.all(this.page.session.columns.map(column => this.answer(column)));
  }

  /** The turn again with another seed; what the column said later goes. */
  async again(id, k) {
    if (this.running.has(id)) return;
    this.keep();
    const {session} = this.page, before = session.turns[k].replies[id];
    this.drop(id, k);
    await this.answer(this.column(id), {[k]: (before?.seed ?? session.settings.seed) + 1});
  }

  /** All turns again, as the column is set now. */
  async rerun(id) {
    if (this.running.has(id)) return;
    this.keep();
    this.drop(id, 0);
    await this.answer(this.column(id));
  }

  /** Another message in the place of one; what came later goes, in all columns. */
  async editUser(k, words) {
    if (this.busy) return;
    this.keep();
    const {session} = this.page;
    session.turns = session.turns.slice(0, k + 1);
    session.turns[k] = {user: words, replies: {}};
    await this.catchUp();
  }

  /** Other words in the place of a reply. The column answers later turns again. */
  async editReply(id, k, words) {
    if (this.running.has(id)) return;
    this.keep();
    const column = this.column(id), reply = this.page.session.turns[k].replies[id];
    this.drop(id, k);
    this.page.session.turns[k].replies[id] = {...reply, text: words, finish: "", error: "", edited: true, read: null, steered: null};
    await this.answer(column);
    await this.project(column);
  }

  /** Stop a column, or all. */
  stop(id) {
    this.playing = 0;
    for (const [own, controller] of this.running) if (!id || own === id) controller.abort();
  }

  column(id) { return this.page.session.columns.find(column => column.id === id); }

  drop(id, from) {
    this.page.session.turns.slice(from).forEach(turn => { delete turn.replies[id]; });
  }

  /** Answer turn after turn until none is left. `seeds` by turn, where they differ from the session's. */
  async answer(column, seeds = {}) {
    const {session} = this.page;
    if (this.running.has(column.id)) return;
    const controller = new AbortController();
    this.running.set(column.id, controller);
    this.view.problem("");
    try {
      for (let k = nextTurn(session, column); k < session.turns.length && !controller.signal.aborted; k++) {
        const reply = await this.reply(column, k, seeds[k] ?? session.settings.seed, controller.signal);
        if (reply.error || reply.finish === "cancelled") break;
        this.project(column);  // the next reply does not wait for it
      }
    } finally {
      this.running.delete(column.id);
      this.view.render();
    }
    await this.project(column);
  }

  async reply(column, k, seed, signal) {
    const {session} = this.page, messages = messagesOf(session, column, k);
    const reply = {text: "", finish: "", setting: settingOf(column), seed, edited: false, error: "", applied: null, read: null, steered: null, writing: true, queued: true};
    session.turns[k].replies[column.id] = reply;
    this.view.render();
    const peeking = setInterval(() => this.peek(column, k, messages, reply), PEEK);
    try {
      const {finish, applied} = await server.stream(server.bodyOf(session, column, messages, seed), words => {
        if (reply.queued) { reply.queued = false; this.view.render(); }
        reply.text += words;
        this.view.piece(column.id, k, words);
      }, signal);
      Object.assign(reply, {finish, applied});
    } catch (error) {
      if (error.name === "AbortError") reply.finish = "cancelled";
      else reply.error = error.message;
    } finally {
      clearInterval(peeking);
    }
    delete reply.writing;
    delete reply.queued;
    this.view.render();
    this.view.say(reply.error ? `${nameOf(column)}: ${reply.error}` : `${nameOf(column)}: ${clip(reply.text, 400) || "no words"}`);
    return reply;
  }

  // Projections: of all replies of a column that have none on the direction that is chosen

  async projectAll() {
    await Promise.all(this.page.session.columns.map(column => this.project(column)));
  }

  /** The projection of a reply as far as it is written. */
  async peek(column, k, messages, reply) {
    const {session} = this.page, along = server.alongKey(session);
    if (!session.along || this.took > SLOW || this.projecting.has(column.id) || !reply.text.trim()) return;
    const controller = new AbortController(), began = performance.now();
    this.projecting.set(column.id, controller);
    try {
      const replies = await server.project(session, [...messages, {role: "assistant", content: reply.text}], column, controller.signal);
      this.took = performance.now() - began;
      const last = replies[messages.length];
      if (!last || !reply.writing || server.alongKey(session) !== along) return;
      Object.assign(reply, last, {partial: true});
      this.view.render();
    } catch {
      // the projection of the whole reply says what is wrong
    } finally {
      if (this.projecting.get(column.id) === controller) this.projecting.delete(column.id);
    }
  }

  async project(column) {
    const {session} = this.page, along = server.alongKey(session);
    const last = session.turns.findLastIndex(turn => finished(turn.replies[column.id]));
    const wanted = session.turns.slice(0, last + 1).some(turn => {
      const reply = turn.replies[column.id];
      return finished(reply) && (reply.read?.along !== along || reply.partial);
    });
    if (!session.along || last < 0 || !wanted) return;
    this.projecting.get(column.id)?.abort();
    const controller = new AbortController();
    this.projecting.set(column.id, controller);
    const said = session.turns.slice(0, last + 1).map(turn => turn.replies[column.id]);
    const messages = [...messagesOf(session, column, last), {role: "assistant", content: said[last].text}];
    try {
      const began = performance.now(), found = await server.project(session, messages, column, controller.signal);
      this.took = performance.now() - began;
      let k = 0;
      messages.forEach(({role}, i) => {
        if (role !== "assistant") return;
        const reply = said[k++];
        Object.assign(reply, found[i] ?? {read: null, steered: null});
        delete reply.partial;
      });
      this.view.render();
    } catch (error) {
      if (error.name !== "AbortError") this.view.problem(`No projection: ${error.message}`);
    } finally {
      if (this.projecting.get(column.id) === controller) this.projecting.delete(column.id);
    }
  }
}

function finished(reply) {
  return !!reply && !reply.writing && reply.text.trim() !== "";
}
