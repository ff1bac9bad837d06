// A control for each column, after its type; what they say is written into the SQL box beside, which may be edited.
const { make } = Heat;
const quoted = (value) => "'" + String(value).replaceAll("'", "''") + "'";
const named = (name) => "`" + name + "`";

export function controls(place, box, columns) {
  let written = "";
  const changed = () => {
    const mine = sqlOf(place, columns), now = box.value.trim();
    // What was written by hand stays.
    const hand = written && now === written ? "" : written && now.endsWith(" AND " + written) ? now.slice(0, -(" AND " + written).length) : now;
    box.value = hand && mine ? (/^\(.*\)$/s.test(hand) ? hand : "(" + hand + ")") + " AND " + mine : hand || mine;
    written = mine;
  };
  place.replaceChildren(...columns.filter((column) => column.name !== "prompt" && column.name !== "response").map((column) => {
    const { name, type, values } = column;
    const options = { "data-column": name, onchange: changed };
    if (type === "whole" || type === "number") {
      const ends = values && values.length ? { min: values[0], max: values[values.length - 1] } : {};
      return make("fieldset", { class: "range" }, make("legend", {}, name),
        make("input", { ...options, ...ends, type: "number", step: "any", "data-end": ">=", "aria-label": name + " from", placeholder: "from" }),
        make("input", { ...options, ...ends, type: "number", step: "any", "data-end": "<=", "aria-label": name + " to", placeholder: "to" }));
    }
    const choice = (pairs) => make("label", {}, name, make("select", options, ...pairs.map(([value, text]) => make("option", { value }, text))));
    if (type === "truth") return choice([["", "any"], ["true", "true"], ["false", "false"]]);
    if (values && values.length) return choice([["", "any"], ...values.map((value, number) => [String(number), String(value)])]);
    return make("label", {}, name + " contains", make("input", { ...options, type: "text" }));
  }));
}

function sqlOf(place, columns) {
  const parts = [];
  for (const control of place.querySelectorAll("[data-column]")) {
    const value = control.value, name = named(control.dataset.column);
    if (value === "") continue;
    const column = columns.find((one) => one.name === control.dataset.column);
    if (control.dataset.end) parts.push(name + " " + control.dataset.end + " " + Number(value));
    else if (control.tagName !== "SELECT") parts.push("contains(lower(" + name + "), " + quoted(value.toLowerCase()) + ")");
    else if (column.type === "truth") parts.push(name + " = " + value);
    else parts.push(name + " = " + quoted(column.values[Number(value)]));
  }
  return parts.join(" AND ");
}
