// Asking the server: JSON, or events that tell how far it is. One thing at a time; whatever goes wrong is said in words.
const id = (name) => document.getElementById(name);
const client = Math.random().toString(36).slice(2);

export class Refused extends Error {}
export class Damaged extends Refused {
  message = "This link is damaged.";
}
let secret = storedSecret(), asking = null, identity = "";

// The database that this page is of. Where another is served by now, at the same address, nothing of it may get mixed up
// with what stands here: the server refuses, and the page is opened anew.
export function speaksOf(database) {
  identity = database;
}
const MOVED = "rapidin.moved";
function movedAway() {
  try {
    sessionStorage.setItem(MOVED, "1");
  } catch {
    // Nobody is told, then.
  }
  location.reload();
  return new Promise(() => {}); // this page ends
}
export function hasMoved() {
  try {
    const moved = sessionStorage.getItem(MOVED) !== null;
    sessionStorage.removeItem(MOVED);
    return moved;
  } catch {
    return false;
  }
}

// What a header can carry; a browser may forbid to keep anything.
function sendable(text) {
  return /^[\x20-\x7e]*$/.test(text);
}
function storedSecret() {
  try {
    const text = sessionStorage.getItem("rapidin.token");
    return text !== null && sendable(text) ? text : null;
  } catch {
    return null;
  }
}
function keepSecret(text) {
  try {
    sessionStorage.setItem("rapidin.token", text);
  } catch {
    // It is asked for again when the page is loaded anew.
  }
}

async function ask(path, { body, signal, accept } = {}) {
  const used = secret, headers = { "x-client": client, accept: accept || "application/json" };
  if (body !== undefined) headers["content-type"] = "application/json";
  if (identity) headers["x-database"] = identity;
  if (secret) headers.authorization = "Bearer " + secret;
  let answer;
  try {
    answer = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it still running?");
  }
  if (answer.status === 401) {
    // Several may be told so at once: one question is enough.
    if (secret === used) {
      asking = asking || askForSecret();
      secret = await asking;
      asking = null;
      if (!secret) throw new Refused("The server asks for the token that it was started with.");
      if (!sendable(secret)) {
        secret = null;
        throw new Refused("A token has only the letters, digits and signs of ASCII: this cannot be it.");
      }
      keepSecret(secret);
    }
    return ask(path, { body, signal, accept });
  }
  if (answer.status === 409) return movedAway();
  if (!answer.ok) throw new Refused(detailOf(await answer.json().catch(() => ({})), answer.status));
  return answer;
}
export const read = async (path, signal) => parsed(await whole((await ask(path, { signal })).text()));
// Whole numbers that this language would round are kept as large ones, where the browser can.
function parsed(text) {
  if (!/(?<![\d.eE+])\d{16,}(?![\d.eE])/.test(text)) return JSON.parse(text);
  return JSON.parse(text, (_, value, { source } = {}) => (typeof value === "number" && !Number.isSafeInteger(value) && /^-?\d+$/.test(source) ? BigInt(source) : value));
}
// The rest of an answer, which may break off.
async function whole(rest) {
  try {
    return await rest;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server stopped in the middle of its answer.");
  }
}

function askForSecret() {
  const dialog = id("secret");
  return new Promise((done) => {
    id("secret-form").onsubmit = (event) => {
      event.preventDefault();
      dialog.close();
    };
    dialog.onclose = () => {
      done(id("secret-text").value);
      id("secret-text").value = "";
    };
    dialog.showModal();
  });
}
function detailOf(found, status) {
  const detail = found.detail;
  if (Array.isArray(detail)) return detail.map((one) => one.loc.slice(1).join(".") + ": " + one.msg).join("; ");
  return detail || "The server answered with status " + status + ".";
}

export const STAGES = {
  gradients: "reading the generation", index: "bringing the index up to date", "exact scores": "reading the influence of samples",
  tokens: "reading the influence of words", matrix: "reading which words drive which", "generated tokens": "the model answers",
  records: "writing the cleaned file", waiting: "waiting for another process that writes to the database",
};
const stageOf = ({ stage, done, total }) => (STAGES[stage] || stage) + (total > 1 ? ": " + done.toLocaleString("en") + " of " + total.toLocaleString("en") : "");

// Events, as they come: progress and parts, then a result or an error.
export async function follow(path, body, signal, part = () => {}) {
  const answer = await ask(path, { body, signal, accept: "text/event-stream" });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const held = [];
  for (;;) {
    let value, done;
    try {
      ({ value, done } = await reader.read());
    } catch (error) {
      if (error.name === "AbortError") throw error;
      done = true;
    }
    if (done) throw new Refused("The server stopped in the middle of its answer.");
    // A large answer comes in many parts: they are joined only once an event ends.
    held.push(value);
    if (!value.includes("\n")) continue;
    const events = held.splice(0).join("").split("\n\n");
    held.push(events.pop());
    for (const one of events) {
      const [event, data] = one.split("\n").map((line) => line.slice(line.indexOf(": ") + 2));
      if (data === undefined) continue; // a word that it is still there
      const found = parsed(data);
      if (event === "progress") say(stageOf(found), "busy");
      if (event === "part") part(found);
      if (event === "error") throw new Refused(found.detail);
      if (event === "result") return found;
    }
  }
}

export function say(text, kind = "") {
  id("status").textContent = text;
  id("status").className = kind;
}

export const wordsOf = (error) => (error instanceof Refused ? error.message : "Something went wrong in this page: " + error.message);

let job = null;
// What is under way belongs to what is shown: it ends, and says so there, where it is stopped or something else is asked.
export const stop = () => job?.abort();
// Where another view is opened nothing is said of it: that would be said there.
export function leave() {
  const left = job;
  job = null;
  left?.abort();
  id("stop").hidden = true;
  id("main").removeAttribute("aria-busy");
}
// `failed` hears in words why it came to nothing, unless something else took its place; `work` says when what is shown holds.
export async function during(what, work, failed = () => {}) {
  stop();
  const mine = (job = new AbortController());
  say(what, "busy");
  id("stop").hidden = false;
  id("main").setAttribute("aria-busy", "true");
  try {
    await work(mine.signal, () => id("main").removeAttribute("aria-busy"));
    if (job === mine && id("status").className === "busy") say("");
    return true;
  } catch (error) {
    if (job !== mine) return false; // late, and of no interest any more
    const stopped = error.name === "AbortError", words = stopped ? "Stopped." : wordsOf(error);
    say(words, stopped ? "" : "error");
    failed(words);
    return false;
  } finally {
    if (job === mine) {
      job = null;
      id("stop").hidden = true;
      id("main").removeAttribute("aria-busy");
    }
  }
}
