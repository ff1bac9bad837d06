// What an answer looks like: the generation, all scores, influence by a column, and the samples.
import { hasMatrix, hasWords, resultsOf } from "./asking.js";
import { earlier } from "./turns.js";

const { make, show, sum, largest } = Heat;

// The influence of a result's tokens on the pressed words, or on all that was asked about.
function scoresOf(result, chosen) {
  if (!result.tokens) return [];
  if (!chosen.size || !result.matrix) return result.tokens.map((token) => token.score);
  return result.matrix.map((row) => sum([...chosen].map((column) => row[column])));
}

// The spans of the pressed words, in code points; those that touch are one.
export function spansOf(answer) {
  const spans = [];
  for (const token of [...answer.chosen].sort((one, other) => one - other)) {
    const { start, end } = answer.ranking.generation_tokens[token], last = spans[spans.length - 1];
    if (last && last[0] < last[1] && start < end && start <= last[1]) last[1] = Math.max(last[1], end);
    else if (!last || last[0] !== start || last[1] !== end) spans.push([start, end]);
  }
  return spans;
}

function histogram(ranking) {
  const space = "http://www.w3.org/2000/svg", { edges, counts } = ranking.histogram;
  const low = edges[0], high = edges[edges.length - 1], most = Math.max(...counts, 1);
  const svg = document.createElementNS(space, "svg");
  const draw = (tag, values) => {
    const element = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(values)) element.setAttribute(name, value);
    svg.append(element);
  };
  svg.setAttribute("viewBox", "0 0 600 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "histogram");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "how the scores of all samples are spread, from " + show(low) + " to " + show(high) + "; the returned samples are marked");
  const at = (score) => (high > low ? (600 * (score - low)) / (high - low) : 300);
  counts.forEach((count, place) => {
    const tall = count ? 4 + (80 * Math.log1p(count)) / Math.log1p(most) : 0;
    draw("rect", { class: "bin", x: (600 * place) / counts.length, y: 88 - tall, width: 600 / counts.length - 1, height: tall });
  });
  if (low < 0 && high > 0) draw("line", { class: "zero", x1: at(0), x2: at(0), y1: 0, y2: 88 });
  // The borders are rounded: the very first may lie a hair outside.
  for (const result of resultsOf({ ranking })) {
    const place = Math.min(599, Math.max(1, at(result.score)));
    draw("line", { class: "mark", x1: place, x2: place, y1: 90, y2: 100 });
  }
  return make("section", { class: "card" }, make("h2", {}, "All scores"), svg,
    make("div", { class: "legend ends" }, make("span", { class: "number" }, show(low)),
      make("span", { class: "soft" }, "how many samples have which score (logarithmic); the lines below mark those returned"), make("span", { class: "number" }, show(high))));
}

function groups(ranking, column) {
  const most = largest(ranking.groups.map((group) => group.score));
  const others = Math.max(0, ranking.groups.length - 50) + (ranking.groups_left_out || 0);
  return make("section", { class: "card" }, make("h2", {}, "Influence by " + column),
    make("table", { class: "groups" }, make("thead", {}, make("tr", {}, ...[column, "samples", "influence", "off by", ""].map((name, place) => make("th", { scope: "col", class: place > 0 && place < 4 ? "number" : "" }, name)))),
      make("tbody", {}, ...ranking.groups.slice(0, 50).map((group) => make("tr", {}, make("td", {}, group.value === null ? "(none)" : String(group.value)),
        make("td", { class: "number" }, group.samples.toLocaleString("en")), make("td", { class: "number" }, show(group.score)), make("td", { class: "number soft", title: "one standard deviation, about" }, show(group.error)), make("td", {}, bar(group.score, most)))))),
    others ? make("p", { class: "soft" }, "and " + others.toLocaleString("en") + " more") : null);
}

export function bar(score, most) {
  const inside = make("i");
  inside.style.setProperty("--share", String(most > 0 ? Math.abs(score) / most : 0));
  return make("span", { class: "bar " + (score < 0 ? "negative" : "positive"), "aria-hidden": "true" }, inside);
}

// A sample's fields, its prompt, and whatever stands for its response.
export function body(sample, response) {
  const fields = [["split", sample.split], ["source", sample.source], ...Object.entries(sample.metadata)].filter(([, value]) => value !== null);
  return [
    make("div", { class: "head" }, ...fields.map(([name, value]) => make("span", { class: "chip" }, name + ": " + String(value)))),
    ...(sample.prompt === null ? [] : [make("div", { class: "label" }, "prompt"), make("div", { class: "text prompt", dir: "auto" }, sample.prompt)]),
    make("div", { class: "label" }, "response"), response || make("div", { class: "text", dir: "auto" }, sample.response),
  ];
}

function card(answer, result, most, longest, { page, elsewhere }) {
  const { chosen, driven } = answer, scores = scoresOf(result, chosen), words = chosen.size && result.matrix;
  const exact = words ? sum(scores) : result.exact_score;
  // A pressed training token shows which generated tokens it drives (Eq. 8).
  const choose = result.tokens ? (tokens, pressed) => {
    answer.driven = pressed ? null : { sample: result.sample_id, tokens };
    page.need(answer);
  } : undefined;
  const here = driven !== null && driven.sample === result.sample_id, driving = (token) => here && driven.tokens.includes(token);
  const other = elsewhere && elsewhere.get(result.sample_id);
  return make("article", { class: "card", "data-sample": result.sample_id },
    make("div", { class: "head" }, make("span", { class: "rank" }, String(result.rank)), page.link(result.sample_id), bar(result.score, longest),
      make("span", { class: "number", title: "from the RapidGrads" }, "score " + show(result.score)),
      exact === null ? null : make("span", { class: "number soft", title: "from the full gradients" }, (words ? "on the pressed words " : "exact ") + show(exact)),
      elsewhere ? make("span", { class: "chip" + (other ? " shared" : "") }, other ? ["rank", other.rank, other.end, "in the other"].filter(Boolean).join(" ") : "in this one only") : null),
    ...body(result, result.tokens ? Heat.coloured(result.pieces, result.ends, scores, page.own ? Heat.deepest(result.pieces, result.ends, scores) : most, { choose, chosen: driving, name: "response" }) : null),
    here ? strip(answer, result) : null,
    page.actions(result));
}

// What the deepest colours of some results stand for.
const deepest = (results, chosen) => largest(results.filter((result) => result.tokens).map((result) => Heat.deepest(result.pieces, result.ends, scoresOf(result, chosen))));

// What a pressed training token drives, by token of the generation.
const drivenBy = (answer, { matrix }) => answer.ranking.generation_tokens.map((_, column) => sum(answer.driven.tokens.map((token) => matrix[token][column])));
const scale = (top) => [make("span", { class: "number" }, top === null ? "less likely" : show(-top)),
  make("span", { class: "scale", role: "img", "aria-label": "blue and dotted: made it less likely; red: made it more likely" }),
  make("span", { class: "number" }, top === null ? "more likely" : "+" + show(top))];
// On a phone the generation is far away from what is pressed: it stands below it, too.
function strip(answer, result) {
  const { ranking } = answer;
  if (!result.matrix) return make("div", { class: "strip" }, make("span", { class: "soft" }, aboutOf(answer)));
  const row = drivenBy(answer, result), top = Heat.deepest(ranking.pieces, ranking.ends, row);
  return make("div", { class: "strip" }, make("div", { class: "label" }, "generation: what the pressed training token drives"),
    Heat.coloured(ranking.pieces, ranking.ends, row, top), make("div", { class: "legend" }, ...scale(top)));
}

// What is shown, in words.
function aboutOf({ ranking, values, chosen, driven, lacks }) {
  const words = Heat.pressed(ranking.pieces || [], ranking.ends || [], chosen);
  const known = hasMatrix({ ranking }), not = lacks ? " is not known" : "", reading = known || lacks ? "" : "reading ";
  if (driven) return reading + "what the pressed training token drives" + (known ? "" : not);
  if (chosen.size) return known ? "influence on " + words : reading + "what drove " + words + not;
  return "influence on " + (values.focus.length ? Heat.named(values.generated, values.focus) : "the " + (ranking.pieces ? Heat.extent(ranking.pieces, ranking.ends) : "generation"));
}
// What an answer lacks, why, and what can be done.
const LACKS = {
  words: ["The influence of words is missing: ", " The ranking stands without it."],
  matrix: ["Which words drive which is missing: ", " What is shown stands without it; to rank by the pressed words takes less."],
};
function lack(answer, page) {
  if (!answer.lacks) return null;
  const [what, rest] = LACKS[answer.lacks.step];
  return make("p", { class: "lacks" }, what + answer.lacks.why + (/[.?!]$/.test(answer.lacks.why) ? "" : ".") + rest + " ",
    make("button", { type: "button", "data-does": "more", onclick: () => { answer.lacks = null; page.need(answer); } }, "Try again"));
}

function generation(answer, page, alone) {
  const { ranking, values, chosen } = answer, results = resultsOf(answer), explained = hasWords(answer) && results.length > 0;
  const driven = answer.driven && hasMatrix(answer) && results.find((result) => result.sample_id === answer.driven.sample);
  const press = (tokens, pressed) => {
    answer.driven = null;
    for (const token of tokens) pressed ? chosen.delete(token) : chosen.add(token);
    page.need(answer);
  };
  const most = deepest(results, chosen);
  let text, top = page.own ? null : most; // the legend's end
  if (!ranking.pieces) text = make("div", { class: "text", dir: "auto" }, values.generated);
  else if (driven) {
    const row = drivenBy(answer, driven);
    top = Heat.deepest(ranking.pieces, ranking.ends, row); // the generation is coloured after this token alone
    text = Heat.coloured(ranking.pieces, ranking.ends, row, top, { choose: press, chosen: () => false, name: "generation" });
  } else text = Heat.generation(ranking.pieces, ranking.ends, values.focus, { chosen, press: explained ? press : null });
  if (alone) text.id = driven ? "driven" : "generation";
  const each = make("input", { type: "checkbox", "data-does": "each", onchange: (event) => { page.own = event.target.checked; page.render(); } });
  each.checked = page.own;
  const does = (name, text, act, off = false) => make("button", { type: "button", id: alone ? name : null, "data-does": name, disabled: off ? "" : null, onclick: act }, text);
  return make("section", { class: "card" + (alone ? " sticky" : "") },
    make("div", { class: "within" }, earlier(values, answer.unfolded), ...(values.prompt === "" ? [] : [make("div", { class: "label" }, "prompt"), make("div", { class: "text prompt", dir: "auto" }, values.prompt)]),
      make("div", { class: "label" }, "generation" + (explained ? " (press words to see what drove them)" : "")), text),
    lack(answer, page),
    make("div", { class: "legend" }, ...(explained ? [...scale(top),
      driven ? make("span", { class: "soft" }, "here; in the samples " + (page.own ? "each its own" : "±" + show(most))) : null] : []),
      make("span", { class: "about", id: alone ? "about" : null, "aria-live": "polite" }, aboutOf(answer)),
      explained ? make("span", { class: "signs" }, Heat.LEGEND) : null),
    make("div", { class: "tools" },
      ...(explained ? [does("refocus", "Rank by the pressed words", () => page.refocus(answer, spansOf(answer)), !chosen.size)] : []),
      does("whole", "Whole generation", () => {
        chosen.clear();
        answer.driven = null;
        if (values.focus.length) page.refocus(answer, []);
        else page.render();
      }, !chosen.size && !answer.driven && !values.focus.length),
      ...(alone ? [does("compare", "Compare with another generation", () => page.compare(answer))] : [does("keep", "Keep this one only", () => page.keepOnly(answer))]),
      ...(explained ? [make("label", { class: "check" }, each, " scale each sample by itself")] : []),
      does("link", "Copy link", page.copyLink)));
}

// How far its scores may be off, what it leaves out, and of which version of the database it is.
export function remarks(ranking) {
  const { score_error: error, note } = ranking, told = error ? "Scores are off by " + show(error) + " or so (one standard deviation), but for exact ones. " : "";
  return make("p", { class: "soft remarks" }, told + (note ? note[0].toUpperCase() + note.slice(1) + ". " : ""), Heat.origin(ranking));
}

// All of an answer; `elsewhere` has the ranks of samples in the answer that stands beside it, and of which end they are.
export function list(answer, page, elsewhere = null) {
  const { ranking, values } = answer, results = resultsOf(answer);
  const most = deepest(results, answer.chosen), longest = largest(results.map((result) => result.score));
  const cards = (some) => some.map((result) => card(answer, result, most, longest, { page, elsewhere }));
  return [
    generation(answer, page, elsewhere === null), ...(ranking.histogram ? [histogram(ranking)] : []), ...(ranking.groups?.length ? [groups(ranking, values.group_by)] : []),
    ...(results.length ? [] : [make("p", { class: "soft" }, "No sample matches.")]), remarks(ranking),
    ...[ranking.results, ranking.harmful || []].flatMap((some) => (some.length ? [make("h2", {}, Heat.heading(some, some === ranking.harmful)), ...cards(some)] : [])),
  ];
}
