// Asking the server: JSON, or events that tell how far it is. One thing at a time; whatever goes wrong is said in words.
const id = (name) => document.getElementById(name);
const client = Math.random().toString(36).slice(2);

export class Refused extends Error {}
let secret = sessionStorage.getItem("rapidin.token"), asking = null;

export async function ask(path, { body, signal, accept } = {}) {
  const used = secret, headers = { "x-client": client, accept: accept || "application/json" };
  if (body !== undefined) headers["content-type"] = "application/json";
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
      sessionStorage.setItem("rapidin.token", secret);
    }
    return ask(path, { body, signal, accept });
  }
  if (!answer.ok) throw new Refused(detailOf(await answer.json().catch(() => ({})), answer.status));
  return answer;
}
export const read = async (path, signal) => (await ask(path, { signal })).json();

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

// Events, as they come: progress, then a result or an error.
export async function follow(path, body, signal) {
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
      const found = JSON.parse(data);
      if (event === "progress") say(found.stage + ": " + found.done.toLocaleString("en") + " of " + found.total.toLocaleString("en"), "busy");
      if (event === "error") throw new Refused(found.detail);
      if (event === "result") return found;
    }
  }
}

export function say(text, kind = "") {
  id("status").textContent = text;
  id("status").className = kind;
}

let job = null;
// What is under way belongs to what is shown: it ends where something else is asked, or another view opened.
export function stop() {
  if (job) job.abort();
}
export async function during(what, work) {
  stop();
  const mine = (job = new AbortController());
  say(what, "busy");
  id("stop").hidden = false;
  id("main").setAttribute("aria-busy", "true");
  try {
    await work(mine.signal);
    if (job === mine && id("status").className === "busy") say("");
    return true;
  } catch (error) {
    if (job !== mine) return false; // late, and of no interest any more
    if (error.name === "AbortError") say("Stopped.");
    else say(error instanceof Refused ? error.message : "Something went wrong in this page: " + error.message, "error");
    return false;
  } finally {
    if (job === mine) {
      job = null;
      id("stop").hidden = true;
      id("main").removeAttribute("aria-busy");
    }
  }
}
