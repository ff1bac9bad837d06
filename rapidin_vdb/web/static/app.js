"use strict";
(() => {
  const { make, show, sum, largest } = Heat;
  const id = (name) => document.getElementById(name);
  const client = Math.random().toString(36).slice(2);
  const state = { view: "ask", columns: [], answers: [], chosen: new Set(), own: false, job: null, driven: null };

  // ---- what is kept in this browser: marked samples, history, the token of the server
  const kept = (name, otherwise) => {
    try { return JSON.parse(localStorage.getItem("rapidin." + name)) ?? otherwise; } catch { return otherwise; }
  };
  const keep = (name, value) => { try { localStorage.setItem("rapidin." + name, JSON.stringify(value)); } catch { /* full, or forbidden */ } };
  let marked = new Map(kept("marked", []));
  function mark(sample, on) {
    on ? marked.set(sample.sample_id, (sample.response || "").slice(0, 80)) : marked.delete(sample.sample_id);
    keep("marked", [...marked]);
    id("marks").textContent = String(marked.size);
  }

  // ---- the server
  class Refused extends Error {}
  let secret = sessionStorage.getItem("rapidin.token");
  async function ask(path, { body, signal, accept } = {}) {
    const headers = { "x-client": client, accept: accept || "application/json" };
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
      secret = window.prompt("This server asks for its token:");
      if (!secret) throw new Refused("The server asks for the token that it was started with.");
      sessionStorage.setItem("rapidin.token", secret);
      return ask(path, { body, signal, accept });
    }
    if (!answer.ok) throw new Refused(detailOf(await answer.json().catch(() => ({})), answer.status));
    return answer;
  }
  function detailOf(found, status) {
    const detail = found.detail;
    if (Array.isArray(detail)) return detail.map((one) => one.loc.slice(1).join(".") + ": " + one.msg).join("; ");
    return detail || "The server answered with status " + status + ".";
  }
  // Events, as they come: progress, then a result or an error.
  async function follow(path, body, signal) {
    const answer = await ask(path, { body, signal, accept: "text/event-stream" });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let waiting = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Refused("The server stopped in the middle of its answer.");
      waiting += value;
      let end;
      while ((end = waiting.indexOf("\n\n")) >= 0) {
        const [event, data] = waiting.slice(0, end).split("\n").map((line) => line.slice(line.indexOf(": ") + 2));
        waiting = waiting.slice(end + 2);
        const found = JSON.parse(data);
        if (event === "progress") say(found.stage + ": " + found.done.toLocaleString("en") + " of " + found.total.toLocaleString("en"), "busy");
        if (event === "error") throw new Refused(found.detail);
        if (event === "result") return found;
      }
    }
  }
  function say(text, kind = "") {
    id("status").textContent = text;
    id("status").className = kind;
  }
  // One thing at a time; whatever goes wrong is said in words.
  async function during(what, work) {
    if (state.job) state.job.abort();
    const job = (state.job = new AbortController());
    say(what, "busy");
    id("stop").hidden = false;
    try {
      await work(job.signal);
      if (state.job === job && id("status").className === "busy") say("");
    } catch (error) {
      if (error.name === "AbortError") { if (state.job === job) say("Stopped."); }
      else say(error instanceof Refused ? error.message : "Something went wrong in this page: " + error.message, "error");
    } finally {
      if (state.job === job) { state.job = null; id("stop").hidden = true; }
    }
  }

  // ---- filters: a control for each column, and SQL beside
  const quoted = (value) => "'" + String(value).replaceAll("'", "''") + "'";
  const named = (name) => "`" + name + "`";
  function controls(place, changed) {
    place.replaceChildren(...state.columns.filter((column) => column.name !== "prompt" && column.name !== "response").map((column) => {
      const { name, type, values } = column;
      const options = { "data-column": name, "data-type": type, onchange: changed };
      if (values && values.length && values.length <= 100) {
        const choices = values.map((value, place) => make("option", { value: String(place) }, String(value)));
        return make("label", {}, name, make("select", options, make("option", { value: "" }, "any"), ...choices));
      }
      if (type === "whole" || type === "number")
        return make("label", {}, name + " from, to", make("span", { class: "row" },
          make("input", { ...options, type: "number", step: "any", "data-end": ">=", "aria-label": name + " from" }),
          make("input", { ...options, type: "number", step: "any", "data-end": "<=", "aria-label": name + " to" })));
      if (type === "truth")
        return make("label", {}, name, make("select", options, ...["", "true", "false"].map((value) => make("option", { value }, value || "any"))));
      return make("label", {}, name + " contains", make("input", { ...options, type: "text" }));
    }));
  }
  function sqlOf(place) {
    const parts = [];
    for (const control of place.querySelectorAll("[data-column]")) {
      const value = control.value, name = named(control.dataset.column);
      if (value === "") continue;
      const column = state.columns.find((one) => one.name === control.dataset.column);
      if (control.dataset.end) parts.push(name + " " + control.dataset.end + " " + Number(value));
      else if (control.tagName === "SELECT" && column.values) {
        const chosen = column.values[Number(value)];
        parts.push(name + " = " + (typeof chosen === "string" ? quoted(chosen) : String(chosen)));
      } else if (control.tagName === "SELECT") parts.push(name + " = " + value);
      else parts.push(name + " LIKE " + quoted("%" + value + "%"));
    }
    return parts.join(" AND ");
  }

  // ---- asking
  const FIELDS = ["prompt", "generated", "where", "top_k", "ends", "group_by", "tokens"];
  function read() {
    const values = {};
    for (const name of FIELDS) values[name] = id(name).type === "checkbox" ? id(name).checked : id(name).value;
    return { ...values, focus: [] };
  }
  function write(values) {
    for (const name of FIELDS) {
      if (values[name] === undefined) continue;
      if (id(name).type === "checkbox") id(name).checked = values[name]; else id(name).value = values[name];
    }
  }
  function requestOf(values) {
    return {
      prompt: values.prompt === "" ? null : values.prompt, generation: values.generated, where: values.where.trim() || null,
      top_k: Number(values.top_k), harmful: values.ends === "harmful", both: values.ends === "both", group_by: values.group_by || null,
      tokens: values.tokens, matrix: values.tokens, focus: values.focus || [], histogram: 60,
    };
  }
  async function query(values, { beside = false, remember = true } = {}) {
    await during("asking", async (signal) => {
      const started = performance.now();
      const ranking = await follow("/api/query?pieces=true", requestOf(values), signal);
      const answer = { values, ranking, seconds: (performance.now() - started) / 1000 };
      state.answers = beside && state.answers.length ? [state.answers[0], answer] : [answer];
      state.chosen.clear();
      state.driven = null;
      if (remember) {
        location.hash = "ask=" + encodeURIComponent(JSON.stringify(values));
        keep("history", [{ values, at: new Date().toISOString() }, ...kept("history", []).filter((one) => JSON.stringify(one.values) !== JSON.stringify(values))].slice(0, 100));
      }
      if (!values.focus.length || state.answers.length > 1 || !state.base) state.base = values;
      go("ask", false);
      render();
      say(ranking.results.length + " of " + ranking.searched.toLocaleString("en") + " samples, in " + answer.seconds.toFixed(2) + " s");
    });
  }

  // ---- what an answer looks like
  const scoresOf = (result) => {
    if (!result.tokens) return [];
    if (!state.chosen.size || !result.matrix) return result.tokens.map((token) => token.score);
    return result.matrix.map((row) => sum([...state.chosen].map((column) => row[column])));
  };
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
      const tall = count ? 2 + (93 * Math.log1p(count)) / Math.log1p(most) : 0;
      draw("rect", { class: "bin", x: (600 * place) / counts.length, y: 95 - tall, width: 600 / counts.length - 1, height: tall });
    });
    if (low < 0 && high > 0) draw("line", { class: "zero", x1: at(0), x2: at(0), y1: 0, y2: 100 });
    for (const result of [...ranking.results, ...(ranking.harmful || [])])
      if (result.score >= low && result.score <= high) draw("line", { class: "mark", x1: at(result.score), x2: at(result.score), y1: 80, y2: 100 });
    return make("section", { class: "card" }, make("h2", {}, "All scores"), svg,
      make("div", { class: "legend" }, make("span", { class: "number" }, show(low)),
        make("span", { class: "soft" }, "samples a score, on a logarithmic scale; red lines: those shown below"), make("span", { class: "number" }, show(high))));
  }
  function groups(ranking) {
    const most = largest(ranking.groups.map((group) => group.score));
    return make("section", { class: "card" }, make("h2", {}, "Influence by " + state.answers[0].values.group_by),
      make("table", {}, make("thead", {}, make("tr", {}, ...["value", "samples", "influence", ""].map((name) => make("th", { scope: "col" }, name)))),
        make("tbody", {}, ...ranking.groups.slice(0, 50).map((group) => {
          const bar = make("i");
          bar.style.setProperty("--share", String(most > 0 ? Math.abs(group.score) / most : 0));
          return make("tr", {}, make("td", {}, group.value === null ? "(none)" : String(group.value)), make("td", { class: "number" }, group.samples.toLocaleString("en")),
            make("td", { class: "number" }, show(group.score)), make("td", {}, make("div", { class: "bar " + (group.score < 0 ? "negative" : "positive"), "aria-hidden": "true" }, bar)));
        }))));
  }
  function actions(sample) {
    const on = marked.has(sample.sample_id);
    return make("div", { class: "actions" },
      make("button", { type: "button", "aria-pressed": String(on), onclick: (event) => {
        const now = !marked.has(sample.sample_id);
        mark(sample, now);
        event.target.setAttribute("aria-pressed", String(now));
        event.target.textContent = now ? "Marked" : "Mark";
      } }, on ? "Marked" : "Mark"),
      make("button", { type: "button", onclick: () => nearest(sample.sample_id) }, "Nearest by influence"));
  }
  function chips(sample) {
    return make("div", { class: "head" }, ...[["split", sample.split], ["source", sample.source], ...Object.entries(sample.metadata)]
      .filter(([, value]) => value !== null).map(([name, value]) => make("span", { class: "chip" }, name + ": " + String(value))));
  }
  function prompt(sample) {
    return sample.prompt === null ? [] : [make("div", { class: "label" }, "prompt"), make("div", { class: "text prompt", dir: "auto" }, sample.prompt)];
  }
  function card(result, most, longest, ranking) {
    const scores = scoresOf(result), chosen = state.chosen.size && result.matrix;
    const bar = make("i");
    bar.style.setProperty("--share", String(longest > 0 ? Math.abs(result.score) / longest : 0));
    const exact = chosen ? sum(scores) : result.exact_score;
    // A pressed training token shows which generated tokens it drives (Eq. 8).
    const choose = result.matrix ? (tokens, pressed) => {
      state.driven = pressed ? null : { sample: result.sample_id, tokens };
      render();
    } : undefined;
    const driving = (token) => state.driven !== null && state.driven.sample === result.sample_id && state.driven.tokens.includes(token);
    return make("article", { class: "card", "data-sample": result.sample_id },
      make("div", { class: "head" }, make("span", { class: "rank" }, String(result.rank)), make("span", { class: "id" }, result.sample_id),
        make("span", { class: "bar " + (result.score < 0 ? "negative" : "positive"), "aria-hidden": "true" }, bar),
        make("span", { class: "number", title: "from the RapidGrads" }, "score " + show(result.score)),
        exact === null ? null : make("span", { class: "number soft", title: "from the full gradients" }, (chosen ? "on the chosen words " : "exact ") + show(exact))),
      chips(result), ...prompt(result), make("div", { class: "label" }, "response"),
      result.tokens ? Heat.coloured(result.pieces, result.ends, scores, state.own ? largest(scores) : most, { choose, chosen: driving })
        : make("div", { class: "text", dir: "auto" }, result.response),
      actions(result));
  }
  function asked(answer, alone) {
    const { ranking, values } = answer;
    const results = [...ranking.results, ...(ranking.harmful || [])];
    const driven = alone && state.driven && results.find((result) => result.sample_id === state.driven.sample);
    let text;
    if (!ranking.pieces) text = make("div", { class: "text", dir: "auto" }, values.generated);
    else if (driven) {
      const row = ranking.generation_tokens.map((_, column) => sum(state.driven.tokens.map((token) => driven.matrix[token][column])));
      text = Heat.coloured(ranking.pieces, ranking.ends, row, largest(row));
      text.id = "driven";
    } else
      text = Heat.generation(ranking.pieces, ranking.ends, values.focus, { chosen: state.chosen, press: alone ? (tokens, pressed) => {
        for (const token of tokens) pressed ? state.chosen.delete(token) : state.chosen.add(token);
        render(tokens.join(" "));
      } : null });
    const words = (ranking.pieces || []).filter(([, tokens]) => tokens.some((token) => state.chosen.has(token))).map(([piece]) => piece.trim()).filter(Boolean);
    const about = driven ? "what the pressed training token drives" : state.chosen.size ? "influence on " + (words.join(" ") || "the end of text")
      : values.focus.length ? "influence on " + values.focus.join(", ") : "influence on the whole generation";
    const most = largest(results.flatMap(scoresOf));
    const each = make("input", { type: "checkbox", id: "each", onchange: (event) => { state.own = event.target.checked; render(); } });
    each.checked = state.own;
    const span = focusText(ranking);
    return make("section", { class: "card" + (alone ? " sticky" : "") },
      values.prompt === "" ? null : make("div", { class: "label" }, "prompt"),
      values.prompt === "" ? null : make("div", { class: "text prompt", dir: "auto" }, values.prompt),
      make("div", { class: "label" }, "generation" + (ranking.pieces && alone ? " (press words)" : "")), text,
      results.some((result) => result.tokens) ? make("div", { class: "legend" }, make("span", { class: "number" }, state.own ? "less likely" : show(-most)),
        make("span", { class: "scale", role: "img", "aria-label": "blue and dotted: made it less likely; red: made it more likely" }),
        make("span", { class: "number" }, state.own ? "more likely" : "+" + show(most)), make("span", { id: "about", "aria-live": "polite" }, about)) : null,
      !alone ? null : make("div", { class: "tools" },
        make("button", { type: "button", id: "refocus", disabled: span === null ? "" : null, onclick: () => query({ ...values, focus: [span] }) }, "Rank by the pressed words"),
        make("button", { type: "button", id: "whole", onclick: () => {
          state.chosen.clear();
          state.driven = null;
          values.focus.length ? query({ ...values, focus: [] }) : render();
        } }, "Whole generation"),
        make("label", { class: "check", for: "each" }, each, " scale each sample by itself"),
        make("button", { type: "button", id: "link", onclick: copyLink }, "Copy link")));
  }
  // The text from the first pressed token to the last: what Eq. 7 is asked about.
  function focusText(ranking) {
    if (!state.chosen.size || !ranking.pieces) return null;
    const places = ranking.pieces.flatMap(([, tokens], place) => (tokens.some((token) => state.chosen.has(token)) ? [place] : []));
    if (!places.length) return null;
    const text = ranking.pieces.slice(places[0], places[places.length - 1] + 1).map(([piece]) => piece).join("").trim();
    return text || null;
  }
  async function copyLink() {
    try { await navigator.clipboard.writeText(location.href); say("The link to this question is copied."); } catch { say("The link to this question stands in the address bar."); }
  }
  function list(answer, alone) {
    const { ranking } = answer, results = [...ranking.results, ...(ranking.harmful || [])];
    const most = largest(results.flatMap(scoresOf)), longest = largest(results.map((result) => result.score));
    const less = answer.values.ends === "harmful";
    return [
      asked(answer, alone), ...(ranking.histogram ? [histogram(ranking)] : []), ...(ranking.groups ? [groups(ranking)] : []),
      make("h2", {}, less ? "Training samples that made it less likely" : "Training samples that made it more likely"),
      ...ranking.results.map((result) => card(result, most, longest, ranking)),
      ...(ranking.results.length ? [] : [make("p", { class: "soft" }, "No sample matches.")]),
      ...(ranking.harmful ? [make("h2", {}, "Training samples that made it less likely"), ...ranking.harmful.map((result) => card(result, most, longest, ranking))] : []),
    ];
  }
  function render(focus) {
    if (state.view !== "ask") return;
    if (!state.answers.length) return id("main").replaceChildren(make("p", { class: "soft" }, "Paste what a model said, and ask which training samples made it say so."));
    const alone = state.answers.length === 1;
    const compare = make("button", { type: "button", id: "compare", onclick: () => {
      say("Change the prompt or the generation, and ask: both answers will stand side by side.");
      state.beside = true;
      id("generated").focus();
    } }, "Compare with another generation");
    id("main").replaceChildren(
      ...(alone ? [...list(state.answers[0], true), compare] : [
        make("button", { type: "button", onclick: () => { state.answers = [state.answers[1]]; render(); } }, "Keep the second only"),
        make("div", { class: "columns" }, ...state.answers.map((answer) => make("div", {}, ...list(answer, false))))]));
    if (focus !== undefined) {
      const again = [...id("main").querySelectorAll("#generation .choice")].find((button) => button.dataset.tokens === focus);
      if (again) again.focus({ preventScroll: true });
    }
  }

  // ---- browsing, marked samples, history
  function plain(sample, score) {
    return make("article", { class: "card", "data-sample": sample.sample_id },
      make("div", { class: "head" }, make("span", { class: "id" }, sample.sample_id),
        score === undefined ? make("span", { class: "soft" }, sample.tokens + " tokens, loss " + show(sample.loss)) : make("span", { class: "number" }, "score " + show(score))),
      chips(sample), ...prompt(sample), make("div", { class: "label" }, "response"), make("div", { class: "text", dir: "auto" }, sample.response), actions(sample));
  }
  async function browse(offset = 0) {
    await during("reading", async (signal) => {
      const where = id("browse-where").value.trim();
      location.hash = "browse=" + encodeURIComponent(where);
      const asked = new URLSearchParams({ offset, limit: 20 });
      if (where) asked.set("where", where);
      const found = await (await ask("/api/samples?" + asked, { signal })).json();
      const turn = (to, name) => make("button", { type: "button", disabled: to < 0 || to >= found.total ? "" : null, onclick: () => browse(to) }, name);
      id("main").replaceChildren(
        make("div", { class: "tools" }, turn(offset - 20, "Before"), make("span", {}, found.total ? (offset + 1).toLocaleString("en") + " to " +
          (offset + found.samples.length).toLocaleString("en") + " of " + found.total.toLocaleString("en") : "No sample matches."), turn(offset + 20, "Next")),
        ...found.samples.map((sample) => plain(sample)));
      say(found.total.toLocaleString("en") + " samples");
    });
  }
  async function nearest(sampleId) {
    await during("searching", async (signal) => {
      const ranking = await (await ask("/api/nearest?" + new URLSearchParams({ sample_id: sampleId, top_k: 20 }), { signal })).json();
      go("browse", false);
      location.hash = "nearest=" + encodeURIComponent(sampleId);
      id("main").replaceChildren(make("h2", {}, "Nearest to " + sampleId + " by influence"), ...ranking.results.map((result) => plain(result, result.score)));
      id("main").focus();
      say(ranking.results.length + " samples");
    });
  }
  function save(name, parts, type) {
    const link = make("a", { download: name });
    link.href = URL.createObjectURL(new Blob(parts, { type }));
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  function showMarked() {
    const ids = [...marked.keys()];
    id("main").replaceChildren(
      make("div", { class: "tools" },
        make("button", { type: "button", id: "save-ids", disabled: ids.length ? null : "", onclick: () =>
          save("marked.jsonl", [ids.map((name) => JSON.stringify({ id: name }) + "\n").join("")], "application/x-ndjson") }, "Save the ids (JSON lines)"),
        make("button", { type: "button", id: "save-clean", class: "strong", onclick: () => during("writing the cleaned file", async (signal) => {
          const answer = await ask("/api/export", { body: { without: ids }, signal });
          save("cleaned.jsonl", [await answer.blob()], "application/x-ndjson");
          say("Saved cleaned.jsonl: all samples but the " + ids.length + " marked.");
        }) }, "Save training data without them"),
        make("button", { type: "button", disabled: ids.length ? null : "", onclick: () => {
          for (const name of ids) mark({ sample_id: name }, false);
          showMarked();
        } }, "Unmark all")),
      ...(ids.length ? [] : [make("p", { class: "soft" }, "Nothing is marked. Mark samples where they are shown.")]),
      ...[...marked].map(([name, text]) => make("article", { class: "card" }, make("div", { class: "head" }, make("span", { class: "id" }, name),
        make("span", { class: "soft" }, text)), make("div", { class: "actions" }, make("button", { type: "button", onclick: () => { mark({ sample_id: name }, false); showMarked(); } }, "Unmark")))));
  }
  function showHistory() {
    const past = kept("history", []);
    id("main").replaceChildren(
      ...(past.length ? [make("button", { type: "button", onclick: () => { keep("history", []); showHistory(); } }, "Forget all")] : [make("p", { class: "soft" }, "Nothing was asked yet.")]),
      ...past.map(({ values, at }) => make("article", { class: "card" }, make("div", { class: "soft" }, new Date(at).toLocaleString()),
        make("div", { class: "text prompt", dir: "auto" }, values.prompt), make("div", { class: "text", dir: "auto" }, values.generated),
        make("div", { class: "actions" }, make("button", { type: "button", onclick: () => { write(values); query(values); } }, "Ask again")))));
  }
  function go(view, show = true) {
    state.view = view;
    for (const tab of document.querySelectorAll(".tab")) tab.setAttribute("aria-pressed", String(tab.dataset.view === view));
    for (const form of document.querySelectorAll("[data-in]")) form.hidden = form.dataset.in !== view;
    if (!show) return;
    say("");
    ({ ask: render, browse: () => browse(), marked: showMarked, history: showHistory })[view]();
  }

  // ---- beginning
  function fromLink() {
    const [view, value] = location.hash.slice(1).split("=");
    let given;
    try { given = decodeURIComponent(value || ""); } catch { return; }
    if (view === "ask" && given) {
      try {
        const values = { ...read(), ...JSON.parse(given) };
        write(values);
        query(values, { remember: false });
      } catch { say("This link is damaged.", "error"); }
    } else if (view === "browse") { id("browse-where").value = given; go("browse"); }
    else if (view === "nearest") nearest(given);
  }
  for (const tab of document.querySelectorAll(".tab")) tab.addEventListener("click", () => go(tab.dataset.view));
  id("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const beside = state.beside;
    state.beside = false;
    query(read(), { beside });
  });
  id("browse").addEventListener("submit", (event) => { event.preventDefault(); browse(); });
  id("stop").addEventListener("click", () => state.job && state.job.abort());
  id("generate").addEventListener("click", () => during("the model answers", async (signal) => {
    const body = { prompt: id("prompt").value, max_tokens: Number(id("max_tokens").value), temperature: Number(id("temperature").value), seed: Number(id("seed").value) };
    const found = await follow("/api/generate", body, signal);
    id("generated").value = found.generation;
    id("sampled").textContent = "said at temperature " + found.temperature + ", seed " + found.seed + ", at most " + found.max_tokens + " tokens";
    say(found.generation ? "" : "The model said nothing.");
  }));
  (async () => {
    id("marks").textContent = String(marked.size);
    await during("opening", async (signal) => {
      const [about, columns] = await Promise.all(["/api/info", "/api/columns"].map(async (path) => (await ask(path, { signal })).json()));
      state.columns = columns;
      id("name").textContent = about.path + ": " + about.samples.toLocaleString("en") + " samples";
      controls(id("filters"), () => { id("where").value = sqlOf(id("filters")); });
      controls(id("browse-filters"), () => { id("browse-where").value = sqlOf(id("browse-filters")); });
      id("group_by").replaceChildren(make("option", { value: "" }, "none"), ...columns.filter((one) => one.values && one.values.length > 1).map((one) => make("option", { value: one.name }, one.name)));
    });
    render();
    fromLink();
  })();
})();
