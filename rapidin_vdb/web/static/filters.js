// A control for each column, after its type. The SQL box is what counts: the controls show what it says, as far as it is
// written as they write it, and change that part of it.
const { make } = Heat;
const quoted = (value) => "'" + String(value).replaceAll("'", "''") + "'";
const named = (name) => "`" + name + "`";
const FULL = new Set(["sample_id", "split", "response", "tokens", "loss", "truncated"]); // every sample has them
const NONE = "none"; // no number of a value
const PIECE = /'(?:[^']|'')*'|"[^"]*"|`[^`]*`|[()]|\s+AND\s+|./gs;

export function controls(place, box, columns) {
  const changed = () => {
    const { hand } = taken(box.value.trim(), place, columns), mine = written(place, columns);
    box.value = hand && mine ? (bracketed(hand) ? hand : "(" + hand + ")") + " AND " + mine : hand || mine;
  };
  place.replaceChildren(...columns.map((column) => {
    const { name, type, values } = column, options = { "data-column": name, onchange: changed };
    const none = FULL.has(name) ? null : make("label", { class: "check" }, make("input", { ...options, type: "checkbox", "aria-label": name + " none" }), " none");
    if (type === "whole" || type === "number") {
      const end = (sign, word) => make("input", { ...options, type: "number", step: "any", "data-end": sign, "aria-label": name + " " + word, placeholder: word });
      return make("fieldset", { class: "range" }, make("legend", {}, name), end(">=", "from"), end("<=", "to"), none);
    }
    const listed = type === "truth" ? [["true", "true"], ["false", "false"]] : (values || []).map((value, number) => [String(number), String(value)]);
    if (listed.length) {
      const choices = [["", "any"], ...listed, ...(none ? [[NONE, "(none)"]] : [])];
      return make("label", {}, name, make("select", options, ...choices.map(([value, text]) => make("option", { value }, text))));
    }
    return make("div", { class: "range" }, make("label", {}, name + " contains", make("input", { ...options, type: "text" })), none);
  }));
  box.oninput = () => {
    const { found } = taken(box.value.trim(), place, columns);
    for (const control of all(place)) {
      if (control.type === "checkbox") control.checked = found.has(control);
      else control.value = found.get(control) ?? "";
    }
  };
  box.oninput(); // a browser may have kept what stood there
}

// What a box is set to from outside, as by a link, is shown by its controls too.
export function fill(box, value) {
  box.value = value;
  box.dispatchEvent(new Event("input"));
}

const all = (place) => [...place.querySelectorAll("[data-column]")];

function condition(control, column, value) {
  const name = named(column.name);
  if (control.type === "checkbox" || value === NONE) return name + " IS NULL";
  if (control.dataset.end) return name + " " + control.dataset.end + " " + (/^-?\d+$/.test(value) ? value : Number(value)); // not every whole number is one here
  if (control.tagName !== "SELECT") return "contains(lower(" + name + "), " + quoted(value.toLowerCase()) + ")";
  return name + " = " + (column.type === "truth" ? value : quoted(column.values[value]));
}
function written(place, columns) {
  const set = all(place).filter((control) => (control.type === "checkbox" ? control.checked : control.value !== ""));
  return set.map((control) => condition(control, columns.find((one) => one.name === control.dataset.column), control.value)).join(" AND ");
}

// The conditions at the end of a filter that the controls may have written, by control; what stands before is by hand.
function taken(sql, place, columns) {
  const parts = conjuncts(sql), found = new Map();
  while (parts.length) {
    const control = all(place).find((one) => !found.has(one) && valueOf(parts.at(-1), one, columns) !== undefined);
    if (!control) break;
    found.set(control, valueOf(parts.pop(), control, columns));
  }
  const hand = parts.join(" AND ");
  // Beside what is not in brackets they mean what its author meant: all of it is by hand.
  return !hand || bracketed(hand) ? { hand, found } : { hand: sql, found: new Map() };
}
function valueOf(part, control, columns) {
  const column = columns.find((one) => one.name === control.dataset.column), name = named(column.name);
  const says = (value) => value !== "" && condition(control, column, value) === part;
  if (control.tagName === "SELECT") return [...control.options].map((option) => option.value).find(says);
  if (control.type === "checkbox") return says("on") ? "on" : undefined;
  const text = control.dataset.end ? part.slice((name + " " + control.dataset.end + " ").length)
    : part.slice(("contains(lower(" + name + "), '").length, -2).replaceAll("''", "'");
  return says(text) ? text : undefined;
}
function conjuncts(sql) {
  const parts = [""];
  let depth = 0;
  for (const [piece] of sql.matchAll(PIECE)) {
    depth += piece === "(" ? 1 : piece === ")" ? -1 : 0;
    if (depth === 0 && /^\s+AND\s+$/.test(piece)) parts.push("");
    else parts[parts.length - 1] += piece;
  }
  return sql === "" ? [] : parts;
}
// Whether all of it stands in one pair of brackets; those in quotes are none.
function bracketed(sql) {
  const pieces = [...sql.matchAll(PIECE)].map(([piece]) => piece);
  let depth = 0;
  return pieces[0] === "(" && pieces.every((piece, place) => {
    depth += piece === "(" ? 1 : piece === ")" ? -1 : 0;
    return depth > 0 ? place < pieces.length - 1 : depth === 0 && place === pieces.length - 1;
  });
}
