// Short ways to make elements. Texts are always set as text, never read as markup.

/** An element with properties, and children that are elements or texts. Names with a hyphen, and role, are attributes. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element[name] = value;
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

export function button(words, act, properties = {}) {
  return make("button", {type: "button", textContent: words, onclick: act, ...properties});
}

/** A choice of [value, words] pairs, or of groups {label, options}. */
export function fillSelect(select, entries, value) {
  const option = ([key, words]) => make("option", {value: key, textContent: words});
  select.replaceChildren(...entries.map(entry => Array.isArray(entry) ? option(entry) : make("optgroup", {label: entry.label}, ...entry.options.map(option))));
  select.value = value;
}

export const byId = id => document.getElementById(id);

/** Give a file to whoever looks at the page. */
export function download(name, words, type = "application/json") {
  const url = URL.createObjectURL(new Blob([words], {type}));
  make("a", {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** Copy a text; whether that worked. Without the clipboard (plain HTTP from another machine) the text is selected instead. */
export async function copy(words, element) {
  try {
    await navigator.clipboard.writeText(words);
    return true;
  } catch {
    if (element.select) element.select(); else getSelection().selectAllChildren(element);
    return false;
  }
}
