// The views, and the way between them: what is shown follows from the address, so that links, back and forward work.
import * as kept from "./kept.js";
import { Damaged, during, follow, hasMoved, leave, read, say, speaksOf, stop, wordsOf } from "./server.js";
import { again, complete, completed, keyOf, placesOf, ranked, wanting } from "./asking.js";
import { controls, fill } from "./filters.js";
import { write, written } from "./form.js";
import { list } from "./answer.js";
import { browsed, sampleView, pastView, markedView } from "./views.js";
import { forgotten } from "./training.js";
import * as turns from "./turns.js";

const { make } = Heat;
const id = (name) => document.getElementById(name), main = id("main");
let shown = null, beside = null, last = null, view = "";

// ---- what is shown, and where the keyboard is in it
function placeOf(element) {
  if (!element || element === main || !main.contains(element)) return null;
  const { side = "" } = element.closest("[data-side]")?.dataset ?? {}, { sample = "" } = element.closest("[data-sample]")?.dataset ?? {};
  return JSON.stringify([side, sample, element.dataset.does || element.id || element.dataset.tokens || element.textContent]);
}
// What is drawn anew stays where it was scrolled to.
const scrolling = () => [...main.querySelectorAll(".within")];
function put(...parts) {
  const key = placeOf(document.activeElement), scrolled = scrolling().map((one) => one.scrollTop);
  main.replaceChildren(...parts.filter((part) => part !== null));
  scrolling().forEach((one, number) => (one.scrollTop = scrolled[number] ?? 0));
  if (key === null) return;
  const again = [...main.querySelectorAll("a, button, input, select, summary, [tabindex]")].find((element) => !element.disabled && placeOf(element) === key);
  (again || main).focus({ preventScroll: true });
}
export function navigate(to, value) {
  const before = location.href;
  location.hash = to + (value === undefined ? "" : "=" + encodeURIComponent(JSON.stringify(value)));
  if (location.href === before) route();
}

const page = {
  own: false, put, navigate,
  render: () => shown && put(...shown()),
  link: (sampleId) => make("a", { class: "id", href: "#sample=" + encodeURIComponent(JSON.stringify(sampleId)) }, sampleId),
  actions(sample, ...others) {
    const button = make("button", { type: "button", "data-does": "mark", "data-marks": sample.sample_id, onclick: () => {
      // What is shown is what is meant, also where another tab has changed it meanwhile.
      const safe = kept.mark(sample, button.getAttribute("aria-pressed") !== "true");
      if (!safe) say("This browser keeps no more: what is marked is lost when this page is closed. Save the ids before.", "error");
      count();
    } });
    told(button, kept.marked());
    return make("div", { class: "actions" }, button, ...others);
  },
  count,
  // What is pressed needs to be known; what is under way looks at it when it comes to its end.
  need(answer) {
    page.render();
    if (shown === null || !wanting(answer)) return; // what stands of the question before is only to be read
    during("reading the influence of words", (signal, calm) => {
      calm();
      return complete(view === "compare" ? sides : [answer], signal, page.render);
    }, page.render);
  },
  again(view, value) {
    for (const values of [value].flat()) again(completed(values));
    navigate(view, value);
  },
  refocus(answer, focus) {
    answer.chosen.clear(); // whoever comes back to it begins anew
    answer.driven = null;
    reask(answer, { ...answer.values, focus });
  },
  compare(answer) {
    beside = answer.values;
    showBeside();
    say("Change the prompt or the generation, and ask: both answers will stand side by side.");
    id("generated").focus();
  },
  keepOnly: (answer) => navigate("ask", answer.values),
  async copyLink() {
    try {
      await navigator.clipboard.writeText(location.href);
      say("The link to this question is copied.");
    } catch {
      say("The link to this question stands in the address bar.");
    }
  },
};
function told(button, marked) {
  const on = marked.has(button.dataset.marks);
  button.setAttribute("aria-pressed", String(on));
  button.textContent = on ? "Marked" : "Mark";
}
// A sample may stand on the page more than once.
function count() {
  const marked = kept.marked();
  id("marks").textContent = String(marked.size);
  for (const button of main.querySelectorAll("[data-marks]")) told(button, marked);
}

// ---- asking
function reask(answer, values) {
  if (view !== "compare") return navigate("ask", values);
  navigate("compare", sides.map((side) => (side === answer ? values : side.values)));
}
let sides = [];
function showBeside() {
  id("beside").hidden = beside === null;
  if (beside !== null) id("beside-what").textContent = "Compared with: " + beside.generated.slice(0, 80) + (beside.generated.length > 80 ? "…" : "");
}
// What was asked before must not stand below a question that came to nothing.
function cleared() {
  shown = last = null;
  put();
}
const nothing = () => [make("p", { class: "soft" }, "Paste what a model said, and ask which training samples made it say so.")];

// What stands already stays, whatever becomes of the rest.
const broken = () => (shown === null ? cleared() : page.render());
async function openAsk(given) {
  if (given === undefined) {
    shown = nothing;
    page.render();
    return;
  }
  const values = completed(given);
  write(values);
  if (values.generated === "") {
    shown = nothing;
    page.render();
    return say("There is no generation to ask about: paste what the model said, or let it answer.", "error");
  }
  beside = null;
  showBeside();
  await during("ranking the samples", async (signal, calm) => {
    const { answer, fresh } = await ranked(values, signal);
    shown = () => list(answer, page);
    page.render();
    calm();
    last = { to: "ask", given: values, form: keyOf({ ...values, focus: [] }) };
    kept.remember("ask", values);
    if (fresh) tellSize();
    await complete([answer], signal, page.render);
    say(answer.ranking.results.length + " of " + answer.ranking.searched.toLocaleString("en") + " samples, in " + answer.seconds.toFixed(2) + " s");
  }, broken);
}
async function openCompare(given) {
  if (!Array.isArray(given) || given.length !== 2) throw new Damaged();
  const both = given.map(completed);
  write(both[1]);
  beside = both[0];
  showBeside();
  await during("ranking the samples", async (signal, calm) => {
    // The same question twice has two selections all the same, and nothing is pressed yet.
    sides = [];
    for (const values of both) {
      const { answer } = await ranked(values, signal);
      sides.push({ ...answer, known: answer, chosen: new Set(), driven: null });
    }
    const places = sides.map(({ ranking }) => placesOf(ranking));
    const shared = [...places[0].keys()].filter((name) => places[1].has(name)).length;
    shown = () => [make("p", { class: "soft", id: "shared" }, shared + " of the " + places[0].size + " samples on the left are on the right too."),
      make("div", { class: "columns" }, ...sides.map((side, number) => make("div", { "data-side": String(number) }, ...list(side, page, places[1 - number]))))];
    page.render();
    calm();
    last = { to: "compare", given: both, form: keyOf({ ...both[1], focus: [] }) };
    kept.remember("compare", both);
    tellSize();
    await complete(sides, signal, page.render);
    say("Two generations, side by side.");
  }, broken);
}

// ---- the way
const VIEWS = {
  ask: openAsk,
  compare: openCompare,
  browse: (given) => browsed(page, given || {}),
  sample: (given) => sampleView(page, textOf(given)),
  marked: () => markedView(page),
  history: () => pastView(page),
};
function textOf(given) {
  if (typeof given !== "string") throw new Damaged();
  return given;
}
const FORMS = { compare: "ask", sample: "" };
let routed = 0;
async function route() {
  const mine = (routed += 1);
  leave();
  forgotten();
  say("");
  const [to, text] = location.hash.slice(1).split("=");
  const next = Object.hasOwn(VIEWS, to) ? to : "ask";
  const form = FORMS[next] ?? next;
  if (form !== (FORMS[view] ?? view)) main.replaceChildren();
  view = next;
  shown = null;
  for (const tab of document.querySelectorAll(".tab")) tab.setAttribute("aria-pressed", String(tab.dataset.view === (form || "browse")));
  for (const one of document.querySelectorAll("[data-in]")) one.hidden = one.dataset.in !== form;
  try {
    if (!ready) say("opening", "busy");
    await (opened = opened || opening());
  } catch (error) {
    opened = null;
    if (mine !== routed) return;
    say(wordsOf(error), "error");
    put(make("button", { type: "button", onclick: route }, "Try again"));
    return;
  }
  if (mine !== routed) return; // another view was opened meanwhile
  if (id("status").textContent === "opening") say("");
  try {
    await VIEWS[next](text ? parsed(text) : undefined);
  } catch (error) {
    if (mine !== routed) return;
    shown = null;
    put();
    say(wordsOf(error), "error");
  }
}
function parsed(text) {
  try {
    return JSON.parse(decodeURIComponent(text));
  } catch {
    throw new Damaged();
  }
}
const named = (about) => (id("name").textContent = about.path + ": " + about.samples.toLocaleString("en") + " samples");
// There may be more of them by now; of no weight where it is not found out.
const tellSize = () => read("api/info").then(named, () => {});
// What every view needs, asked for once; whatever is pressed meanwhile waits for it.
let opened = null, ready = false;
async function opening() {
  const [about, columns] = await Promise.all([read("api/info"), read("api/columns")]);
  for (const told of [kept.keepFor, speaksOf]) told(about.identity);
  count();
  named(about);
  for (const [filters, where] of [["filters", "where"], ["browse-filters", "browse-where"], ["clean-filters", "clean-where"]]) controls(id(filters), id(where), columns);
  const several = columns.filter((one) => one.values && one.values.length > 1), splits = several.find((one) => one.name === "split")?.values || [];
  id("group_by").replaceChildren(make("option", { value: "" }, "nothing"), ...several.map((one) => make("option", { value: one.name }, one.name)));
  // Where there are sources, their influence is of interest; and what is to be cleaned is what was trained on.
  if (several.some((one) => one.name === "source")) id("group_by").value = "source";
  if (splits.includes("train")) fill(id("clean-where"), "`split` = 'train'");
  ready = true;
}

// ---- what is pressed
for (const tab of document.querySelectorAll(".tab"))
  tab.addEventListener("click", () => {
    // The way back to the question leads to its answer, unless the question was changed.
    const back = tab.dataset.view === "ask" && last !== null && keyOf(written()) === last.form && (last.to === "compare") === (beside !== null);
    navigate(back ? last.to : tab.dataset.view, back ? last.given : undefined);
  });
id("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  // Only then is it known by what influence can be added up; an opening that fails is told of where it is waited for.
  if (!ready) await opened?.catch(() => {});
  if (!turns.complete()) return;
  const values = written();
  again(values);
  if (beside === null) navigate("ask", values);
  else navigate("compare", [beside, values]);
});
id("ask").addEventListener("input", ({ target }) => { if (target.matches("textarea, #turns, #turns *")) id("sampled").textContent = ""; });
id("ask").addEventListener("keydown", (event) => { if (event.target.matches("textarea") && event.key === "Enter" && (event.ctrlKey || event.metaKey)) id("ask").requestSubmit(); });
id("add-turn").addEventListener("click", turns.added);
id("alone").addEventListener("click", () => {
  beside = null;
  showBeside();
  say("");
});
id("browse").addEventListener("submit", (event) => {
  event.preventDefault();
  navigate("browse", { where: id("browse-where").value.trim() });
});
id("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !id("secret").open) stop(); });
id("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address is for views
  main.focus();
});
id("generate").addEventListener("click", () => turns.complete() && during("the model answers", async (signal) => {
  id("sampled").textContent = "";
  signal.addEventListener("abort", () => (id("sampled").textContent = "the model was stopped before it had answered"));
  const { turns: earlier, prompt } = written();
  const body = { ...(earlier ? { messages: turns.messagesOf({ turns: earlier, prompt }) } : { prompt }), max_tokens: Number(id("max_tokens").value), temperature: Number(id("temperature").value), seed: Number(id("seed").value) };
  const found = await follow("api/generate", body, signal);
  id("generated").value = found.generation;
  id("sampled").textContent = "said at temperature " + found.temperature + ", seed " + found.seed + ", at most " + found.max_tokens + " tokens";
  say(found.generation ? "" : "The model said nothing.");
}));
window.addEventListener("hashchange", route);
window.addEventListener("storage", ({ key }) => {
  if (!kept.isMarks(key)) return;
  count();
  if (view === "marked" && ready) markedView(page);
});

id("moved").hidden = !hasMoved();
route();
