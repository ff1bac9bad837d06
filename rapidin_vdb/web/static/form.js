// The form of a question: what is written in it.
import { fill } from "./filters.js";
import * as turns from "./turns.js";

const id = (name) => document.getElementById(name);
const FIELDS = ["prompt", "generated", "where", "top_k", "ends", "group_by", "tokens"];
export function written() {
  const values = { focus: [] }, before = turns.written();
  if (before.length) values.turns = before;
  for (const name of FIELDS) values[name] = id(name).type === "checkbox" ? id(name).checked : id(name).value;
  return values;
}
export function write(values) {
  const before = values.turns ?? [];
  if (["prompt", "generated"].some((name) => id(name).value !== values[name]) || JSON.stringify(turns.written()) !== JSON.stringify(before)) id("sampled").textContent = "";
  turns.write(before);
  for (const name of FIELDS) {
    if (id(name).type === "checkbox") id(name).checked = values[name];
    else if (name === "where") fill(id(name), values[name]);
    else id(name).value = values[name];
  }
  if (values.where) id("among").open = true;
}
