"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main");
  const state = { ranking: 0, chosen: new Set(), each: false };

  const { make, show, sum, largest } = Heat;

  function scoresOf(result) {
    if (!state.chosen.size || !result.matrix) return result.scores;
    return result.matrix.map((row) => sum([...state.chosen].map((column) => row[column])));
  }
  function generation(ranking) {
    const clickable = ranking.results.some((result) => result.matrix) || ranking.harmful.some((result) => result.matrix);
    const press = (tokens, pressed) => {
      for (const token of tokens) pressed ? state.chosen.delete(token) : state.chosen.add(token);
      render(tokens.join(" "));
    };
    return Heat.generation(ranking.generation, ranking.ends, ranking.focus, { press: clickable ? press : null, chosen: state.chosen });
  }

  function card(result, most, longest) {
    const scores = scoresOf(result);
    const own = state.each ? Heat.deepest(result.response, result.ends, scores) : most;
    const chosen = state.chosen.size && result.matrix;
    const exact = chosen ? sum(scores) : result.exact_score;
    const bar = make("i");
    bar.style.setProperty("--share", String(longest > 0 ? Math.abs(result.score) / longest : 0));
    const chips = [["split", result.split], ["source", result.source], ...Object.entries(result.metadata)]
      .filter(([, value]) => value !== null)
      .map(([name, value]) => make("span", { class: "chip" }, name + ": " + String(value)));
    return make("article", { class: "card", "data-sample": result.sample_id },
      make("div", { class: "head" },
        make("span", { class: "rank" }, String(result.rank)),
        make("span", { class: "id" }, result.sample_id),
        make("span", { class: "bar " + (result.score < 0 ? "negative" : "positive"), "aria-hidden": "true" }, bar),
        make("span", { class: "number", title: "from the RapidGrads" }, "score " + show(result.score)),
        exact === null ? null : make("span", { class: "number soft", title: "from the full gradients: the sum of the tokens" }, (chosen ? "on the chosen tokens " : "exact ") + show(exact))),
      make("div", { class: "head" }, ...chips),
      result.prompt === null ? null : make("div", { class: "label" }, "prompt"),
      result.prompt === null ? null : make("div", { class: "text prompt", dir: "auto" }, result.prompt),
      make("div", { class: "label" }, "response"),
      Heat.coloured(result.response, result.ends, scores, own));
  }

  function render(focus) {
    const ranking = data.rankings[state.ranking];
    const results = [...ranking.results, ...ranking.harmful];
    const most = largest(results.map((result) => Heat.deepest(result.response, result.ends, scoresOf(result))));
    const longest = largest(results.map((result) => result.score));
    const about = state.chosen.size ? "influence on " + Heat.pressed(ranking.generation, ranking.ends, state.chosen)
      : ranking.focus.length ? "influence on " + Heat.named(ranking.generation.map(([text]) => text).join(""), ranking.focus) : "influence on the " + Heat.extent(ranking.generation, ranking.ends);
    const each = make("input", { type: "checkbox", id: "each", onchange: (event) => { state.each = event.target.checked; render(); } });
    each.checked = state.each;
    const top = make("section", { class: "card sticky" },
      ranking.prompt === null ? null : make("div", { class: "label" }, "prompt"),
      ranking.prompt === null ? null : make("div", { class: "text prompt", dir: "auto" }, ranking.prompt),
      make("div", { class: "label" }, "generation"),
      generation(ranking),
      make("div", { class: "legend", id: "legend" },
        make("span", { class: "number", id: "lowest" }, state.each ? "less likely" : show(-most)),
        make("span", { class: "scale", role: "img", "aria-label": "blue and dotted: made it less likely; red: made it more likely" }),
        make("span", { class: "number", id: "highest" }, state.each ? "more likely" : "+" + show(most)),
        make("span", { id: "about", "aria-live": "polite" }, about),
        make("span", { class: "signs" }, Heat.LEGEND)),
      make("div", { class: "tools" },
        make("button", { type: "button", id: "whole", onclick: () => { state.chosen.clear(); render(); } }, ranking.focus.length ? "what was asked" : "whole generation"),
        make("label", { for: "each" }, each, " scale each sample by itself")));
    const part = (some) => (some.length ? [make("h2", {}, Heat.heading(some, some === ranking.harmful)), ...some.map((result) => card(result, most, longest))] : []);
    main.replaceChildren(top, ...(results.length ? [] : [make("p", { class: "soft" }, "no sample matches")]), ...part(ranking.results), ...part(ranking.harmful));
    if (focus !== undefined) {
      const again = [...main.querySelectorAll("#generation .choice")].find((button) => button.dataset.tokens === focus);
      if (again) again.focus({ preventScroll: true });
    }
  }

  function header() {
    const about = data.rankings[state.ranking];
    const choose = data.rankings.length < 2 ? null : make("label", {}, "query ",
      make("select", { id: "query", onchange: (event) => { state.ranking = Number(event.target.value); state.chosen.clear(); header(); render(); } },
        ...data.rankings.map((ranking, number) => {
          const option = make("option", { value: String(number) }, ranking.query_id);
          option.selected = number === state.ranking;
          return option;
        })));
    document.getElementById("top").replaceChildren(
      make("h1", {}, data.title),
      make("div", { class: "soft" }, "searched " + about.searched.toLocaleString("en") + " samples" + (about.where === null ? "" : " that match " + about.where) + ". Score: " + about.unit + "." + (about.error ? " Scores are off by " + show(about.error) + " or so (one standard deviation), but for exact ones." : "") + (about.note ? " Note: " + about.note + "." : "") + " ", Heat.origin(about)),
      choose === null ? "" : make("div", { class: "tools" }, choose));
  }

  header();
  render();
})();
