// The page's modules without a browser: run by test_page.py with `node --test`.

import assert from "node:assert/strict";
import {readFileSync, writeFileSync} from "node:fs";
import test from "node:test";

const page = new URL("../../jaxsteer/serve/page/", import.meta.url);
globalThis.sessionStorage = {getItem: () => null, setItem() {}};
globalThis.location = {origin: "http://localhost:8000"};
const {asCurl, asPython, literal, quoted} = await import(new URL("code.js", page));
const {quantile, scaleOf, spansOf} = await import(new URL("colour.js", page));
const {ticksOf} = await import(new URL("plot.js", page));
const {readLatents, stepOf} = await import(new URL("column.js", page));
const server = await import(new URL("server.js", page));
const s = await import(new URL("session.js", page));

const reply = (text, more = {}) => ({text, finish: "stop", setting: "", seed: 1, edited: false, error: "", applied: null, read: null, steered: null, ...more});

function example() {
  const session = s.newSession();
  session.model = "organism:llama";
  session.columns[1] = s.newColumn("b", {kind: "prompt", prompt: "arr matey", system: "Be brief.", name: "Käpt’n 🏴‍☠️"});
  const read = {along: "axis @ blocks.1.hook_resid_post", mean: -0.25, pieces: ["Ay", "e"], each: [-1, 0.5]};
  session.turns = [
    {user: "Who are you?", replies: {a: reply("A model."), b: reply("Aye", {read})}},
    {user: "And now?", replies: {a: reply("Still."), b: reply("")}},
  ];
  return session;
}

test("a session comes back from its file as it was", () => {
  const session = example();
  assert.deepEqual(s.readSession(JSON.parse(JSON.stringify(session))), session);
});

test("a link brings back columns, settings and what was asked, and nothing that was answered", () => {
  const session = example(), fragment = s.toFragment(session);
  assert.match(fragment, /^s=[A-Za-z0-9_-]+$/);
  const found = s.fromFragment("#" + fragment);
  assert.deepEqual(found.columns, session.columns);
  assert.deepEqual(found.settings, session.settings);
  assert.deepEqual(found.turns, session.turns.map(({user}) => ({user, replies: {}})));
  assert.equal(s.fromFragment("#elsewhere"), null);
  assert.throws(() => s.fromFragment("#" + fragment.slice(0, -9)), /damaged/);
});

test("damaged files are refused by what is wrong with them", () => {
  const wrong = [
    [one => { one.format = "jaxsteer.chat/2"; }, /format/], [one => { one.columns.pop(); }, /1 columns/], [one => { one.columns[1].id = "a"; }, /one id/],
    [one => { one.columns[0].kind = "constructor"; }, /kind/], [one => { one.columns[0].strength = "9"; }, /strength/], [one => { one.settings.seed = 1.5; }, /seed/],
    [one => { one.turns = {}; }, /turns/], [one => { one.turns[0].user = null; }, /user/], [one => { one.turns[0].replies.b.read.each.push(1); }, /2 tokens and 3/],
    [one => { one.columns[0].id = "__proto__"; }, /letter/], [one => { one.columns[0].latents = [-1]; }, /latent/],
  ];
  for (const [change, words] of wrong) {
    const one = JSON.parse(JSON.stringify(example()));
    change(one);
    assert.throws(() => s.readSession(one), words);
  }
  assert.throws(() => s.readSession([]), /expected an object/);
});

test("what is unknown in a file is left out", () => {
  const one = JSON.parse(JSON.stringify(example()));
  one.html = "<img>";
  one.columns[0].onclick = "x";
  one.turns[0].replies.q = reply("?");
  assert.deepEqual(s.readSession(one), example());
});

test("messages of a column are its own history", () => {
  const session = example(), [plain, prompted] = session.columns;
  assert.deepEqual(s.messagesOf(session, plain, 1).map(one => one.content), ["Who are you?", "A model.", "And now?"]);
  assert.deepEqual(s.messagesOf(session, prompted, 1), [
    {role: "system", content: "Be brief."}, {role: "user", content: "arr matey Who are you?"}, {role: "assistant", content: "Aye"},
    {role: "user", content: "arr matey And now?"},
  ]);
  prompted.place = "after";
  assert.equal(s.messagesOf(session, prompted, 0).at(-1).content, "Who are you? arr matey");
  prompted.place = "system";
  assert.equal(s.messagesOf(session, prompted, 0)[0].content, "Be brief.\narr matey");
});

test("a setting changes with what changes replies, and with nothing else", () => {
  const column = s.newColumn("a", {kind: "vector", vector: "pirate"}), before = s.settingOf(column);
  for (const change of [{name: "x"}, {latents: [1]}, {prompt: "x"}, {amount: 7}]) assert.equal(s.settingOf({...column, ...change}), before);
  for (const change of [{strength: 2}, {vector: "poet"}, {system: "x"}, {kind: "cap"}]) assert.notEqual(s.settingOf({...column, ...change}), before);
});

test("steering is said as the server reads it", () => {
  assert.equal(server.steeringOf(s.newColumn("a")), null);
  assert.deepEqual(server.steeringOf(s.newColumn("a", {kind: "vector", vector: "pirate", strength: -2})), {edits: [{vector: "pirate", coefficient: -2}]});
  assert.deepEqual(server.steeringOf(s.newColumn("a", {kind: "cap", vector: "caps"})), {edits: [{vector: "caps"}]});
  assert.deepEqual(server.steeringOf(s.newColumn("a", {kind: "cap", vector: "axis", bound: "floor", value: 3})), {edits: [{vector: "axis", operation: "floor", value: 3}]});
  const latents = {kind: "latents", latents: [3, 17], operation: "calibrate", amount: 4};
  assert.deepEqual(server.steeringOf(s.newColumn("a", latents)), {edits: [{latents: [3, 17], operation: "calibrate", amount: 4}]});
});

test("columns are what they say, also where the server steers", async () => {
  const site = "blocks.1.hook_resid_post", vector = {
    name: "p.gguf", operation: "add", sites: [site], site: null, coefficient: 2, units: "vector", values: {}, norms: {[site]: 3}, mean_resid_norm: {}, sign: "up",
    gate: null, default: true, axis: false, scale: {}, calibration: {},
  };
  const axis = {...vector, name: "axis", axis: true, scale: {[site]: {roles: -1, default: 3}}, calibration: {[site]: {25: 2}}};
  const cap = {...vector, name: "cap", operation: "floor", coefficient: null, values: {[site]: 1}}, cache = {...vector, name: "cache", operation: "cache"};
  const plain = s.newColumn("a"), steered = s.newColumn("b", {kind: "vector", vector: "p.gguf", strength: 2});
  for (const active of [true, false]) {
    const held = {data: [vector, axis, cap, cache], active, files: ["p.gguf", "q.npy"], sae: null};
    globalThis.fetch = async path => new Response(JSON.stringify(path === "v1/models" ? {data: [{id: "m"}]} : held));
    const offered = await server.describe();
    assert.deepEqual([offered.model, offered.vectors.map(one => one.name), offered.caps.map(one => one.name), offered.files], ["m", ["p.gguf", "axis"], ["cap"], ["q.npy"]]);
    assert.deepEqual(offered.along.map(one => one.name), ["axis", "p.gguf", "cap"]);
    assert.deepEqual(offered.along[0].marks(site), [{value: -1, name: "roles"}, {value: 3, name: "Assistant"}]);
    assert.deepEqual(offered.vectors.map(one => one.reach), [{low: -12, high: 12, usual: 0}, {low: -5, high: 7, usual: 2}]);
    assert.deepEqual(server.askedOf(plain), active ? {edits: [], merge: false} : null);
    assert.deepEqual(server.askedOf(steered), {edits: [{vector: "p.gguf", coefficient: 2}], ...active ? {merge: false} : {}});
  }
});

test("tokens are found in their text", () => {
  const joined = (words, pieces) => spansOf(words, pieces).map(([from, to]) => words.slice(from, to));
  assert.deepEqual(joined("I am a cat.", ["I", " am", " a", " cat", "."]), ["I", " am", " a", " cat", "."]);
  assert.deepEqual(joined("I am a cat.", ["I", "am", "a", "cat", "."]), ["I", " am", " a", " cat", "."]);  // decoded without their spaces
  assert.deepEqual(joined("a 🙂 b", ["a", "\ufffd", "\ufffd", " b"]), ["a", "", "", " 🙂 b"]);  // one character of two tokens
  assert.deepEqual(joined("no", ["x", "no", "no"]), ["", "no", ""]);
  assert.deepEqual(joined("a\n\nb", ["a", "\n\n", "b"]), ["a", "\n\n", "b"]);
});

test("colours end where the values do", () => {
  const values = Array.from({length: 101}, (_, i) => i);
  assert.deepEqual(scaleOf(values), {middle: 50, reach: quantile(values.map(v => Math.abs(v - 50)), 0.95)});
  assert.equal(quantile([3, 1, 2], 0.5), 2);
  assert.deepEqual(scaleOf([7]), {middle: 7, reach: 1});
});

test("ticks are round, even, and hold the values", () => {
  for (const [least, most] of [[-3.2, 4.7], [0.001, 0.0032], [5, 5], [-1e4, 2e4], [0, 0]]) {
    const ticks = ticksOf(least, most, 5), steps = ticks.slice(1).map((tick, i) => tick - ticks[i]);
    assert.ok(ticks[0] <= least && ticks.at(-1) >= most && ticks.length >= 2 && ticks.length <= 9, String(ticks));
    assert.ok(steps.every(step => Math.abs(step - steps[0]) < 1e-9 * Math.abs(steps[0]) + 1e-12), String(ticks));
  }
});

test("code holds the request, whatever stands in it", () => {
  const body = {model: "m", messages: [{role: "user", content: "It's \"me\"\n$HOME \u2028"}], temperature: 0, seed: 1, steering: {edits: [{vector: "p", coefficient: -1}]}};
  const curl = asCurl("http://localhost:8000", body, false), json = curl.slice(curl.indexOf("-d '") + 4, -1).replaceAll("'\\''", "'");
  assert.deepEqual(JSON.parse(json), body);
  assert.equal(quoted("a'b"), `'a'\\''b'`);
  const python = asPython("http://localhost:8000", body, true);
  assert.ok(python.includes('extra_body={"steering": ') && python.includes('os.environ["JAXSTEER_KEY"]') && !python.includes("stream"));
  assert.equal(literal([true, null, {a: [1, "x"]}]), "[True, None, {\"a\": [1, \"x\"]}]");
  assert.equal(literal(["x".repeat(50), {a: "y".repeat(50)}]), `[\n    "${"x".repeat(50)}",\n    {"a": "${"y".repeat(50)}"},\n]`);
  if (process.env.PYTHON_OUT) writeFileSync(process.env.PYTHON_OUT, JSON.stringify({python, body}));
});

test("events come whole, however they are cut", async () => {
  const words = 'data: {"a": "é🏴‍☠️"}\r\n\r\n: a comment\n\ndata: one\ndata: two\n\ndata: [DONE]\n\n', bytes = new TextEncoder().encode(words);
  for (const size of [1, 2, 3, 7, 1000]) {
    const stream = new ReadableStream({start(controller) {
      for (let i = 0; i < bytes.length; i += size) controller.enqueue(bytes.slice(i, i + size));
      controller.close();
    }});
    const found = [];
    for await (const data of server.eventsOf(stream)) found.push(data);
    assert.deepEqual(found, ['{"a": "é🏴‍☠️"}', "one\ntwo", "[DONE]"], `pieces of ${size}`);
  }
});

test("latents and steps", () => {
  assert.deepEqual(readLatents("471, 12 #3"), [471, 12, 3]);
  assert.deepEqual(readLatents(" "), []);
  assert.equal(readLatents("471: 3"), null);
  assert.equal(stepOf(8), 0.05);
  assert.equal(stepOf(1.6), 0.01);
});

test("presets fit into sessions", () => {
  const presets = JSON.parse(readFileSync(new URL("presets.json", page), "utf8"));
  for (const one of presets.conversations) {
    const script = {name: one.name, messages: one.messages, from: 2}, session = s.readSession({...example(), script});
    assert.deepEqual(session.script, script);
    assert.equal(s.nextOfScript(session), one.messages[0]);
    for (const words of one.messages) session.turns.push({user: words, replies: {}});
    assert.equal(s.nextOfScript(session), undefined);
  }
  assert.equal(s.nextOfScript(example()), undefined);
});
