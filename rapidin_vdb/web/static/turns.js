// The turns before a prompt: how they are written, shown and asked. A question of one prompt has none.
import { say } from "./server.js";

const { make } = Heat;
const id = (name) => document.getElementById(name);
const ROLES = ["user", "assistant", "system"];

export const areTurns = (given) => given.every((turn) => typeof turn?.role === "string" && typeof turn.content === "string");
// All that stands before what the model says, as the server takes several turns: the prompt is the last of them.
export const messagesOf = ({ turns, prompt }) => [...turns, ...(prompt === "" ? [] : [{ role: "user", content: prompt }])];

// What is asked about a sample: its response, or where that holds several answers, the last of them after all before it.
export function questionOf({ messages, prompt, response }) {
  if (!messages) return { prompt: prompt || "", generated: response };
  const before = messages.slice(0, -1), generated = messages.at(-1).content, last = before.at(-1);
  const own = last !== undefined && last.role === "user" && last.content !== "";
  const turns = own ? before.slice(0, -1) : before;
  return { ...(turns.length ? { turns } : {}), prompt: own ? last.content : "", generated };
}

// Those of a question, if any; folded, so that what follows is seen beside a long conversation, too. `kept` knows whether.
export function earlier({ turns = [] }, kept = {}) {
  if (!turns.length) return null;
  const all = make("details", { class: "earlier", open: kept.open ? "" : null, ontoggle: () => (kept.open = all.open) },
    make("summary", { "data-does": "earlier" }, turns.length === 1 ? "1 earlier turn" : turns.length.toLocaleString("en") + " earlier turns"),
    ...turns.flatMap(({ role, content }) => [make("div", { class: "label" }, role), make("div", { class: "text prompt", dir: "auto" }, content)]));
  return all;
}

// ---- the form
const rows = () => [...id("turns").querySelectorAll(".turn")];
const partsOf = (row) => ({ role: row.querySelector("select"), content: row.querySelector("textarea") });
export const written = () => rows().map(partsOf).map(({ role, content }) => ({ role: role.value, content: content.value }));
export function write(turns) {
  id("turns").replaceChildren(...turns.map(rowOf));
  numbered();
}

function rowOf({ role, content }) {
  const act = (name, does) => make("button", { type: "button", class: name, onclick: () => does(row) }, name === "up" ? "Up" : "Remove");
  // A sample may have been told by others than those that are usual.
  const roles = [...ROLES, ...(ROLES.includes(role) ? [] : [role])].map((name) => make("option", {}, name));
  const row = make("div", { class: "turn", role: "group" },
    make("div", { class: "by" }, make("label", {}, make("span"), make("select", {}, ...roles)), act("up", moved), act("remove", removed)),
    make("textarea", { rows: "2" }));
  partsOf(row).role.value = role;
  partsOf(row).content.value = content;
  return row;
}
function numbered() {
  const all = rows();
  id("before").hidden = !all.length;
  all.forEach((row, place) => {
    const name = "turn " + (place + 1);
    row.setAttribute("aria-label", name);
    row.querySelector("label span").textContent = "Turn " + (place + 1) + " by ";
    partsOf(row).content.setAttribute("aria-label", "what " + name + " says");
    row.querySelector(".up").setAttribute("aria-label", "Move " + name + " up");
    row.querySelector(".up").disabled = place === 0;
    row.querySelector(".remove").setAttribute("aria-label", "Remove " + name);
  });
}
// What hears of everything that is typed hears of these, too.
function changed() {
  numbered();
  id("turns").dispatchEvent(new Event("input", { bubbles: true }));
}
function moved(row) {
  row.previousElementSibling.before(row);
  changed();
  (row.previousElementSibling ? row.querySelector(".up") : partsOf(row).content).focus();
}
function removed(row) {
  const next = row.nextElementSibling ?? row.previousElementSibling;
  row.remove();
  changed();
  (next ? partsOf(next).content : id("add-turn")).focus();
}
export function added() {
  const last = written().at(-1), row = rowOf({ role: last?.role === "user" ? "assistant" : "user", content: "" });
  id("turns").append(row);
  changed();
  partsOf(row).content.focus();
}

// Whether every turn says something; only a model or a tool may say nothing, where it calls another or has no answer.
export function complete() {
  const place = written().findIndex(({ role, content }) => !content.trim() && (role === "user" || role === "system"));
  if (place < 0) return true;
  say("Turn " + (place + 1) + " says nothing: write what was said, or remove it.", "error");
  partsOf(rows()[place]).content.focus();
  return false;
}
