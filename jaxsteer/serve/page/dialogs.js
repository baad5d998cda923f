// Settings, presets, sharing, help.

import {asCurl, asPython} from "./code.js";
import {byId, button, copy, download, fillSelect, make} from "./elements.js";
import {SETTINGS, messagesOf, nameOf, readSession, toFragment} from "./session.js";
import * as server from "./server.js";

export function wireDialogs(page, conversation, act) {
  for (const [opener, dialog, before] of [
    ["open-settings", "settings-dialog", showSettings], ["presets", "presets-dialog", null], ["open-share", "share-dialog", showShare], ["open-help", "help-dialog", null],
  ]) byId(opener).addEventListener("click", () => { before?.(); byId(dialog).showModal(); });
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
  }

  // Settings

  function showSettings() {
    for (const name of Object.keys(SETTINGS)) byId(name).value = page.session.settings[name];
    byId("key").value = server.getKey();
  }
  for (const [name, {low, high, whole}] of Object.entries(SETTINGS)) {
    byId(name).addEventListener("input", event => {
      const value = event.target.valueAsNumber, fits = Number.isFinite(value) && value >= low && value <= high && (!whole || Number.isInteger(value));
      event.target.setCustomValidity(fits ? "" : `From ${low} to ${high}${whole ? ", a whole number" : ""}.`);
      if (fits) page.session.settings[name] = value;
    });
  }
  byId("key").addEventListener("change", event => { server.setKey(event.target.value); act.connect(); });

  // Presets

  byId("preset-list").addEventListener("presets", () => {
    const groups = [
      ["Conversations that drift", "conversation", page.presets.conversations, one => one.messages[0]],
      ["Roles, for the last column", "role", page.presets.roles, one => one.system],
      ["Attacks, for the message", "attack", page.presets.attacks, one => one.message],
    ];
    byId("preset-list").replaceChildren(...groups.flatMap(([title, kind, some, words]) => [
      make("h3", {textContent: title}),
      make("div", {className: "preset-group"}, ...some.map(one => {
        const made = button("", () => { byId("presets-dialog").close(); act.usePreset(kind, one); });
        made.append(make("b", {textContent: one.name}), make("span", {textContent: one.about ?? words(one)}));
        return made;
      })),
    ]));
  });

  // Share

  let language = "curl";
  function showShare() {
    byId("link").value = location.origin + location.pathname + "#" + toFragment(page.session);
    fillSelect(byId("code-column"), page.session.columns.map(column => [column.id, nameOf(column)]), byId("code-column").value || page.session.columns.at(-1).id);
    if (!byId("code-column").value) byId("code-column").value = page.session.columns.at(-1).id;
    showCode();
  }
  function showCode() {
    const {session} = page, column = session.columns.find(one => one.id === byId("code-column").value);
    const words = byId("said").value.trim() || "Who are you?";
    const after = {...session, turns: [...session.turns, {user: words, replies: {}}]};
    const body = server.bodyOf(session, column, messagesOf(after, column, after.turns.length - 1), session.settings.seed);
    byId("code").textContent = (language === "curl" ? asCurl : asPython)(server.ORIGIN, body, !!server.getKey());
    byId("as-curl").setAttribute("aria-pressed", String(language === "curl"));
    byId("as-python").setAttribute("aria-pressed", String(language === "python"));
  }
  byId("code-column").addEventListener("change", showCode);
  byId("as-curl").addEventListener("click", () => { language = "curl"; showCode(); });
  byId("as-python").addEventListener("click", () => { language = "python"; showCode(); });
  for (const [id, from] of [["copy-link", "link"], ["copy-code", "code"]]) {
    byId(id).addEventListener("click", async event => {
      const element = byId(from), done = await copy(element.value ?? element.textContent, element);
      event.target.textContent = done ? "Copied" : "Selected";
      setTimeout(() => { event.target.textContent = "Copy"; }, 1500);
    });
  }
  byId("download").addEventListener("click", () => {
    const stamp = new Date().toISOString().slice(0, 16).replaceAll(":", "");
    download(`jaxsteer-chat-${stamp}.json`, JSON.stringify({...page.session, saved: new Date().toISOString()}, null, 1));
  });
  byId("upload").addEventListener("change", async event => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    try {
      if (file.size > 5e7) throw new Error("The file is larger than 50 MB.");
      const session = readSession(JSON.parse(await file.text()));
      byId("share-dialog").close();
      const {model} = session;
      act.take(session);
      act.problem(model === page.offered.model ? "" : `This conversation was had with ${model || "an unnamed model"}; here ${page.offered.model} answers.`);
    } catch (error) {
      byId("share-dialog").close();
      act.problem(`${file.name} cannot be opened. ${error.message}`);
    }
  });
}
