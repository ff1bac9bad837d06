// Browsing, one sample, marked samples, history.
import * as kept from "./kept.js";
import { Damaged, during, follow, read, say } from "./server.js";
import { bar, body, remarks } from "./answer.js";
import { fill } from "./filters.js";
import { cleaned, exported, outdated, savedIds } from "./training.js";
import { earlier, questionOf } from "./turns.js";

const { make, show, largest } = Heat;
const id = (name) => document.getElementById(name);
const STEP = 20;

function card(page, sample, beside) {
  return make("article", { class: "card", "data-sample": sample.sample_id },
    make("div", { class: "head" }, page.link(sample.sample_id), ...beside), ...body(sample), page.actions(sample));
}

export async function browsed(page, { where = "", offset = 0 }) {
  if (typeof where !== "string" || !Number.isSafeInteger(offset)) throw new Damaged();
  fill(id("browse-where"), where);
  await during("reading", async (signal) => {
    const asked = new URLSearchParams({ offset, limit: STEP });
    if (where) asked.set("where", where);
    const found = await read("api/samples?" + asked, signal);
    const turn = (to, name) => make("button", { type: "button", disabled: to <= -STEP || to >= found.total ? "" : null, onclick: () => page.navigate("browse", { where, offset: Math.max(0, to) }) }, name);
    const place = found.samples.length ? (offset + 1).toLocaleString("en") + " to " + (offset + found.samples.length).toLocaleString("en") + " of " + found.total.toLocaleString("en") : "No sample matches.";
    const turns = () => make("div", { class: "tools" }, turn(offset - STEP, "Before"), make("span", {}, place), turn(offset + STEP, "Next"));
    page.put(turns(), ...found.samples.map((sample) => card(page, sample, [make("span", { class: "soft" }, sample.tokens + " tokens, loss " + show(sample.loss))])),
      found.samples.length > 5 ? turns() : null);
    say(found.total.toLocaleString("en") + (found.total === 1 ? " sample" : " samples"));
  }, () => page.put());
}

// A sample's text and tokens, and its nearest by influence.
export async function sampleView(page, sampleId) {
  let near = null;
  await during("reading", async (signal) => {
    const sample = await read("api/sample?" + new URLSearchParams({ sample_id: sampleId, pieces: "true" }), signal);
    const text = make("div", { class: "text tokens", dir: "auto" }, ...sample.pieces.map(([piece, tokens]) =>
      make("span", { class: "token " + Heat.kindOf(piece, tokens, false), title: tokens.length ? "token " + tokens.join(", ") : "between tokens" }, piece)),
      ...sample.ends.map((token) => make("span", { class: "token end", title: "token " + token })));
    const about = sample.tokens + " tokens" + (sample.truncated ? ", cut from the right" : "") + ", loss " + show(sample.loss) + " nats a token";
    // Several answers are no generation: what is said between them is not the model's.
    const question = questionOf(sample), several = question.generated !== sample.response;
    const ask = make("button", { type: "button", onclick: () => page.navigate("ask", question) }, "Ask what drives such a response" + (several ? ": its last answer" : ""));
    const whole = make("article", { class: "card", id: "whole-sample" }, make("h2", {}, sample.sample_id), make("div", { class: "soft" }, about), ...body(sample, text), page.actions(sample, ask));
    near = make("section", { id: "nearest" }, make("p", { class: "soft" }, "searching"));
    page.put(whole, make("h2", {}, "Nearest samples by influence"), near);
    id("main").focus({ preventScroll: true });
    window.scrollTo(0, 0);
    const ranking = await follow("api/nearest?" + new URLSearchParams({ sample_id: sampleId, top_k: 21 }), undefined, signal);
    const others = ranking.results.filter((result) => result.sample_id !== sampleId), longest = largest(others.map((result) => result.score));
    near.replaceChildren(remarks(ranking), ...others.slice(0, 20).map((result) => card(page, result, [bar(result.score, longest), make("span", { class: "number" }, "score " + show(result.score))])),
      ...(others.length ? [] : [make("p", { class: "soft" }, "There is no other.")]));
    say("");
  }, (words) => (near ? near.replaceChildren(make("p", { class: "soft" }, "Not found out: " + words)) : page.put()));
}

export function markedView(page) {
  const marked = kept.marked(), ids = [...marked.keys()];
  outdated(ids);
  id("save-ids").disabled = id("unmark").disabled = !ids.length;
  const again = () => {
    page.count();
    markedView(page);
  };
  // What is marked is read when a button is pressed: another tab may have changed it.
  id("save-ids").onclick = () => savedIds(kept.unwanted());
  id("unmark").onclick = () => {
    kept.unmark(ids); // those that are shown
    again();
  };
  id("clean").onsubmit = (event) => {
    event.preventDefault();
    exported(id("clean-where").value.trim() || null, kept.unwanted(), [...kept.marked().keys()]);
  };
  id("own-file").onchange = () => {
    if (id("own-file").files.length) cleaned(id("own-file").files[0], id("own-id").value, kept.unwanted());
    id("own-file").value = ""; // the same file may be given again
  };
  page.put(...(ids.length ? [] : [make("p", { class: "soft" }, "Nothing is marked. Mark samples where they are shown.")]),
    ...[...marked].map(([name, text]) => make("article", { class: "card", "data-sample": name }, make("div", { class: "head" }, page.link(name)), make("div", { class: "text", dir: "auto" }, text),
      make("div", { class: "actions" }, make("button", { type: "button", onclick: () => { kept.unmark([name]); again(); } }, "Unmark")))));
}

export function pastView(page) {
  const past = kept.past();
  const part = (values) => [earlier(values), values.prompt === "" ? null : make("div", { class: "text prompt", dir: "auto" }, values.prompt), make("div", { class: "text", dir: "auto" }, values.generated),
    make("div", { class: "soft" }, [values.focus.length ? "on " + Heat.named(values.generated, values.focus) : "", values.where ? "where " + values.where : ""].filter(Boolean).join(", "))];
  page.put(
    past.length ? make("div", { class: "tools" }, make("button", { type: "button", onclick: () => { kept.forget(); pastView(page); } }, "Forget all")) : make("p", { class: "soft" }, "Nothing was asked yet."),
    ...past.map(({ view, value, at }) => make("article", { class: "card" }, make("div", { class: "soft" }, new Date(at).toLocaleString() + (view === "compare" ? ", two side by side" : "")),
      ...(view === "compare" ? value : [value]).flatMap(part),
      make("div", { class: "actions" }, make("button", { type: "button", onclick: () => page.again(view, value) }, "Ask again")))));
}
