// What is kept in this browser, for each database by itself: marked samples, and what was asked.
let identity = "";
const MOST_TEXT = 1e6; // of what was asked before, in characters: marks need room, too
const memory = new Map(); // where the browser forbids to keep anything, or has no room

export function keepFor(database) {
  identity = database;
}
function kept(name, otherwise) {
  const key = "rapidin." + identity + "." + name;
  try {
    return JSON.parse(memory.get(key) ?? localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}
function keep(name, value) {
  const key = "rapidin." + identity + "." + name, text = JSON.stringify(value);
  try {
    localStorage.setItem(key, text);
    memory.delete(key);
    return true;
  } catch {
    memory.set(key, text);
    return false;
  }
}

// Read each time: another tab may have changed them. What changes them says whether the browser keeps it.
export const marked = () => new Map(kept("marked", []));
export function mark(sampleId, on, text = "") {
  const all = marked();
  if (on) all.set(sampleId, text.slice(0, 200));
  else all.delete(sampleId);
  return keep("marked", [...all]);
}
export function unmark(sampleIds) {
  const all = marked();
  for (const sampleId of sampleIds) all.delete(sampleId);
  keep("marked", [...all]);
}
// Whether what another tab has changed are the marks; all of it may have been forgotten, too.
export const isMarks = (key) => key === null || key === "rapidin." + identity + ".marked";
export const past = () => kept("history", []);
export function remember(view, value) {
  const same = JSON.stringify([view, value]);
  const others = past().filter((one) => JSON.stringify([one.view, one.value]) !== same);
  const all = [{ view, value, at: new Date().toISOString() }, ...others].slice(0, 100);
  let room = MOST_TEXT;
  keep("history", all.slice(0, 1 + all.slice(1).filter((one) => (room -= JSON.stringify(one).length) > 0).length));
}
export const forget = () => keep("history", []);
