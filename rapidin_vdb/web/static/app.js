// The views, and the way between them: what is shown follows from the address, so that links, back and forward work.
import * as kept from "./kept.js";
import { during, follow, read, say, stop, wordsOf } from "./server.js";
import { controls, fill } from "./filters.js";
import { list } from "./answer.js";
import { browsed, sampleView, pastView, markedView } from "./views.js";

const { make } = Heat;
const id = (name) => document.getElementById(name), main = id("main");
const known = new Map(); // answers of late, so that back and forward need not ask again
let shown = null, beside = null, last = null, view = "";

// ---- what is shown, and where the keyboard is in it
function keyOf(element) {
  if (!element || element === main || !main.contains(element)) return null;
  const { side = "" } = element.closest("[data-side]")?.dataset ?? {}, { sample = "" } = element.closest("[data-sample]")?.dataset ?? {};
  return JSON.stringify([side, sample, element.dataset.does || element.id || element.dataset.tokens || element.textContent]);
}
function put(...parts) {
  const key = keyOf(document.activeElement);
  main.replaceChildren(...parts.filter((part) => part !== null));
  if (key === null) return;
  const again = [...main.querySelectorAll("a, button, input, select, [tabindex]")].find((element) => !element.disabled && keyOf(element) === key);
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
      kept.mark(sample.sample_id, button.getAttribute("aria-pressed") !== "true", sample.response);
      count();
    } });
    told(button, kept.marked());
    return make("div", { class: "actions" }, button, ...others);
  },
  count,
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
const FIELDS = ["prompt", "generated", "where", "top_k", "ends", "group_by", "tokens"];
function written() {
  const values = { focus: [] };
  for (const name of FIELDS) values[name] = id(name).type === "checkbox" ? id(name).checked : id(name).value;
  return values;
}
function write(values) {
  if (["prompt", "generated"].some((name) => id(name).value !== values[name])) id("sampled").textContent = "";
  for (const name of FIELDS) {
    if (id(name).type === "checkbox") id(name).checked = values[name];
    else if (name === "where") fill(id(name), values[name]);
    else id(name).value = values[name];
  }
  if (values.where) id("among").open = true;
}
function completed(given) {
  if (typeof given !== "object" || given === null || typeof given.generated !== "string") throw new Error("no question");
  return { prompt: "", where: "", top_k: "10", ends: "helpful", group_by: "", tokens: true, focus: [], ...given };
}
const requestOf = (values) => ({
  prompt: values.prompt === "" ? null : values.prompt, generation: values.generated, where: values.where.trim() || null,
  top_k: Number(values.top_k), harmful: values.ends === "harmful", both: values.ends === "both", group_by: values.group_by || null,
  tokens: values.tokens, matrix: values.tokens, focus: values.focus, histogram: 60,
});
const keyFor = (values) => JSON.stringify(requestOf(values));
let anew = null; // what is asked again though its answer is known: what was ingested since counts
async function answerTo(values, signal) {
  const key = keyFor(values);
  if (!known.has(key) || key === anew) {
    anew = null;
    const started = performance.now(), ranking = await follow("api/query?pieces=true", requestOf(values), signal);
    known.delete(key); // so that it is the youngest
    known.set(key, { values, ranking, seconds: (performance.now() - started) / 1000, chosen: new Set(), driven: null });
    if (known.size > 12) known.delete(known.keys().next().value);
  }
  return known.get(key);
}
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

async function openAsk(given) {
  if (given === undefined) {
    shown = nothing;
    page.render();
    return;
  }
  const values = completed(given);
  write(values);
  beside = null;
  showBeside();
  await during("asking", async (signal) => {
    const answer = await answerTo(values, signal);
    shown = () => list(answer, page);
    page.render();
    last = { to: "ask", given: values, form: keyFor({ ...values, focus: [] }) };
    kept.remember("ask", values);
    say(answer.ranking.results.length + " of " + answer.ranking.searched.toLocaleString("en") + " samples, in " + answer.seconds.toFixed(2) + " s");
  }, cleared);
}
async function openCompare(given) {
  if (!Array.isArray(given) || given.length !== 2) throw new Error("no comparison");
  const both = given.map(completed);
  write(both[1]);
  beside = both[0];
  showBeside();
  await during("asking", async (signal) => {
    // The same question twice has two selections all the same.
    sides = [await answerTo(both[0], signal), { ...(await answerTo(both[1], signal)), chosen: new Set(), driven: null }];
    const places = sides.map(({ ranking }) => new Map([...ranking.results, ...(ranking.harmful || [])].map((result) => [result.sample_id, result.rank])));
    const shared = [...places[0].keys()].filter((name) => places[1].has(name)).length;
    shown = () => [make("p", { class: "soft", id: "shared" }, shared + " of the " + places[0].size + " samples on the left are on the right too."),
      make("div", { class: "columns" }, ...sides.map((side, number) => make("div", { "data-side": String(number) }, ...list(side, page, places[1 - number]))))];
    page.render();
    last = { to: "compare", given: both, form: keyFor({ ...both[1], focus: [] }) };
    kept.remember("compare", both);
    say("Two generations, side by side.");
  }, cleared);
}

// ---- the way
const VIEWS = {
  ask: openAsk,
  compare: openCompare,
  browse: (given) => browsed(page, given || {}),
  sample: (given) => sampleView(page, String(given)),
  marked: () => markedView(page),
  history: () => pastView(page),
};
const FORMS = { compare: "ask", sample: "" };
let routed = 0;
async function route() {
  const mine = (routed += 1);
  stop();
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
    const given = text ? JSON.parse(decodeURIComponent(text)) : undefined;
    await VIEWS[next](given);
  } catch {
    say("This link is damaged.", "error");
  }
}
// What every view needs, asked for once; whatever is pressed meanwhile waits for it.
let opened = null, ready = false;
async function opening() {
  const [about, columns] = await Promise.all([read("api/info"), read("api/columns")]);
  kept.keepFor(about.identity);
  count();
  id("name").textContent = about.path + ": " + about.samples.toLocaleString("en") + " samples";
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
    const back = tab.dataset.view === "ask" && last !== null && keyFor(written()) === last.form && (last.to === "compare") === (beside !== null);
    navigate(back ? last.to : tab.dataset.view, back ? last.given : undefined);
  });
id("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  // Only then is it known by what influence can be added up; an opening that fails is told of where it is waited for.
  if (!ready) await opened?.catch(() => {});
  const values = written();
  anew = keyFor(values);
  if (beside === null) navigate("ask", values);
  else navigate("compare", [beside, values]);
});
for (const name of ["prompt", "generated"]) {
  id(name).addEventListener("input", () => (id("sampled").textContent = ""));
  id(name).addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) id("ask").requestSubmit(); });
}
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
id("generate").addEventListener("click", () => during("the model answers", async (signal) => {
  const body = { prompt: id("prompt").value, max_tokens: Number(id("max_tokens").value), temperature: Number(id("temperature").value), seed: Number(id("seed").value) };
  const found = await follow("api/generate", body, signal);
  id("generated").value = found.generation;
  id("sampled").textContent = "said at temperature " + found.temperature + ", seed " + found.seed + ", at most " + found.max_tokens + " tokens";
  say(found.generation ? "" : "The model said nothing.");
}));
window.addEventListener("hashchange", route);
window.addEventListener("storage", () => {
  count();
  if (view === "marked" && ready) markedView(page);
});

route();
