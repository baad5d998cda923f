// A request as a curl command and as a Python program.

/** A text as one word of a POSIX shell. */
export function quoted(words) {
  return "'" + words.replaceAll("'", "'\\''") + "'";
}

export function asCurl(origin, body, key) {
  const lines = [`curl ${quoted(origin + "/v1/chat/completions")}`, `-H 'Content-Type: application/json'`];
  if (key) lines.push(`-H "Authorization: Bearer $JAXSTEER_KEY"`);
  lines.push(`-d ${quoted(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

const OPENAI = ["model", "messages", "temperature", "top_p", "max_tokens", "seed", "stop"];

export function asPython(origin, body, key) {
  const own = Object.entries(body).filter(([name]) => !OPENAI.includes(name) && !name.startsWith("stream"));
  const lines = [
    key ? "import os\n\nfrom openai import OpenAI\n" : "from openai import OpenAI\n",
    `client = OpenAI(base_url=${literal(origin + "/v1")}, api_key=${key ? 'os.environ["JAXSTEER_KEY"]' : '"none"'})`,
    "answer = client.chat.completions.create(",
  ];
  for (const name of OPENAI) if (name in body) lines.push(`    ${name}=${literal(body[name], 1)},`);
  if (own.length) lines.push(`    extra_body=${literal(Object.fromEntries(own), 1)},`);
  lines.push(")", "print(answer.choices[0].message.content)");
  return lines.join("\n");
}

/** A JSON value as a Python literal, on one line where that is short. */
export function literal(value, depth = 0) {
  const flat = flatLiteral(value), pad = "    ".repeat(depth + 1);
  if (typeof value !== "object" || value === null || flat.length < 90) return flat;
  const inner = Array.isArray(value) ? value.map(one => literal(one, depth + 1))
    : Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one, depth + 1)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return `${open}\n${inner.map(one => `${pad}${one},\n`).join("")}${"    ".repeat(depth)}${close}`;
}

function flatLiteral(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(flatLiteral).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${flatLiteral(one)}`).join(", ")}}`;
  return JSON.stringify(value);  // its escapes are Python's too
}
