"use strict";
// Texts whose tokens carry numbers: shared by the page of a ranking and by the server's page.
const Heat = (() => {
  // Everything from a record goes through here, as text.
  function make(tag, options = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (name === "class") element.className = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== undefined && value !== null) element.setAttribute(name, value);
    }
    for (const child of children) if (child !== null && child !== undefined) element.append(child);
    return element;
  }
  const show = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4 ? value.toFixed(4) : value.toExponential(2));
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

  function paint(element, score, most) {
    const share = most > 0 ? Math.min(1, Math.abs(score) / most) : 0;
    element.classList.add("piece", score < 0 ? "negative" : "positive");
    if (share < 0.1) element.classList.add("faint");
    element.style.setProperty("--level", share.toFixed(4));
  }

  const LEGEND = "red: more likely; blue, underlined with dots from a tenth of the largest on: less likely";
  // What stands above some results: by their signs, for a filter may leave few that made it more likely.
  // `other` are those of the most negative influence beside the others.
  function heading(results, other = false) {
    const scores = results.flatMap((result) => [result.score, result.exact_score ?? result.score]);
    if (scores.every((score) => score <= 0)) return "Training samples that made it less likely";
    if (!other && scores.every((score) => score >= 0)) return "Training samples that made it more likely";
    return "Training samples " + (other ? "at the other end" : "by influence") + ": above zero made it more likely, below zero less likely";
  }

  // What a ranking is of, where that is known: a short mark to look at, and the whole of it to compare.
  const origin = ({ table_version: version, identity }) => (identity ? make("span", { class: "origin", title: identity }, "Version " + version + " of the database " + identity.slice(0, 8) + ".") : null);

  const CUT = "cut off: behind the largest number of tokens of a sample";
  // A text that was cut to the limit of tokens has no end, and a rest behind its last token.
  const lastOf = (pieces, ends) => (ends.length ? pieces.length : pieces.findLastIndex(([, tokens]) => tokens.length));
  // How much of a generation was looked at, in words.
  const extent = (pieces, ends) => (lastOf(pieces, ends) < pieces.length - 1 ? "generation up to the largest number of tokens" : "whole generation");

  const BETWEEN = "no token of an answer: it has no score";
  // How a piece is shown: what ends an answer that others follow has no text, what belongs to no token has no colour.
  function kindOf(text, tokens, cut) {
    if (cut) return "cut";
    if (!text) return "end answer";
    return ((/^\s*\n/.test(text) ? "newline" : "") + (tokens.length ? "" : " between")).trim();
  }

  // A response: pieces of text with the tokens that they belong to, coloured by these tokens' scores.
  // With `choose`, a piece can be pressed, and `chosen` says whether a token is.
  function coloured(pieces, ends, scores, most, { choose, chosen, name } = {}) {
    const block = choose ? pressables(name) : make("div", { class: "text", dir: "auto" });
    const add = (text, tokens, kind) => {
      const score = sum(tokens.map((token) => scores[token]));
      const piece = make("span", choose && tokens.length ? pressable(tokens, tokens.every((token) => chosen(token)), choose) : {}, text);
      if (tokens.length && scores.length) {
        paint(piece, score, most);
        piece.title = tokens.map((token) => show(scores[token])).join(" + ") + (tokens.length > 1 ? " = " + show(score) : "");
        piece.dataset.score = String(score);
        piece.dataset.tokens = tokens.join(" ");
      }
      if (kind) piece.classList.add(...kind.split(" "));
      if (kind === "cut") piece.title = CUT;
      if (kind.endsWith("between")) piece.title = BETWEEN;
      block.append(piece);
    };
    const last = lastOf(pieces, ends);
    pieces.forEach(([text, tokens], place) => add(text, tokens, kindOf(text, tokens, place > last)));
    for (const token of ends) add("", [token], "end");
    return enter(block);
  }

  // A text whose pieces can be pressed is one stop of the keyboard; arrows go from piece to piece.
  function pressables(name) {
    const block = make("div", { class: "text", dir: "auto", role: "group", "aria-label": name });
    const all = () => [...block.querySelectorAll(".choice")];
    block.addEventListener("focusin", (event) => {
      for (const piece of all()) piece.tabIndex = piece === event.target ? 0 : -1;
    });
    block.addEventListener("keydown", (event) => {
      const pieces = all(), at = pieces.indexOf(event.target);
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: pieces.length - 1 }[event.key];
      if (at < 0 || to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      if (pieces[to]) pieces[to].focus();
    });
    return block;
  }
  // The first piece, or the first that is pressed, is where the keyboard comes in.
  function enter(block) {
    const piece = block.querySelector('.choice[aria-pressed="true"]') || block.querySelector(".choice");
    if (piece) piece.tabIndex = 0;
    return block;
  }

  // Not a button element: that would not break across lines as text does.
  function pressable(tokens, pressed, press) {
    const toggle = () => press(tokens, pressed);
    return {
      class: "piece choice", role: "button", tabindex: "-1", "aria-pressed": String(pressed), "data-tokens": tokens.join(" "), onclick: toggle,
      onkeydown: (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        toggle();
      },
    };
  }

  // Which pieces of a generation a query asked about, by the characters they stand at.
  function focused(pieces, entries) {
    const text = pieces.map(([piece]) => piece).join(""), points = [...text], spans = [];
    for (const entry of entries) {
      // A span counts code points, and this language what they are written with.
      if (typeof entry !== "string") spans.push(entry.map((end) => points.slice(0, end).join("").length));
      else for (let at = text.indexOf(entry); entry && at >= 0; at = text.indexOf(entry, at + 1)) spans.push([at, at + entry.length]);
    }
    let start = 0;
    return pieces.map(([piece]) => {
      const from = start, to = (start += piece.length);
      return spans.some(([first, last]) => first < to && from < last);
    });
  }
  // What a query asked about, in words.
  function named(text, entries) {
    const points = [...text];
    return entries.map((entry) => (typeof entry === "string" ? entry : points.slice(...entry).join("").trim() || (entry[1] >= points.length ? "the end of the text" : "a space"))).join(", ");
  }

  // What was pressed, in words.
  function pressed(pieces, ends, chosen) {
    const shown = pieces.filter(([, tokens]) => tokens.some((token) => chosen.has(token)))
      .map(([text]) => text.trim() || (!text ? "the end of an answer" : /\n/.test(text) ? "a line break" : "a space"));
    return [...shown, ...(ends.some((token) => chosen.has(token)) ? ["the end of the text"] : [])].join(" ");
  }

  // The largest score of what is painted: a character of several tokens has their sum.
  const deepest = (pieces, ends, scores) => largest([...pieces.map(([, tokens]) => sum(tokens.map((token) => scores[token] ?? 0))), ...ends.map((token) => scores[token] ?? 0)]);

  // A generation; where `press` is given its pieces can be pressed.
  function generation(pieces, ends, texts, { press, chosen }) {
    const block = press ? pressables("generation") : make("div", { class: "text", dir: "auto" });
    block.id = "generation";
    const asked = focused(pieces, texts);
    const last = lastOf(pieces, ends);
    const add = (text, tokens, kind) => {
      if (!tokens.length || !press) return block.append(make("span", { class: kind, title: kind === "cut" ? CUT : null }, text));
      const options = pressable(tokens, tokens.every((token) => chosen.has(token)), press);
      options.class += " " + kind;
      if (kind.startsWith("end")) options["aria-label"] = "end of text";
      block.append(make("span", options, text));
    };
    pieces.forEach(([text, tokens], place) => add(text, tokens, kindOf(text, tokens, place > last) + (asked[place] ? " focused" : "")));
    const length = [...pieces.map(([piece]) => piece).join("")].length;
    const asksEnd = texts.some((entry) => typeof entry !== "string" && entry[0] === length && entry[1] === length);
    for (const token of ends) add("", [token], "end" + (asksEnd ? " focused" : ""));
    return enter(block);
  }

  return { LEGEND, BETWEEN, kindOf, heading, origin, make, show, sum, largest, deepest, coloured, generation, named, pressed, extent };
})();
