// What is kept in this browser, for each database by itself: marked samples, and what was asked.
let identity = "";
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
  } catch {
    memory.set(key, text);
  }
}

// Read each time: another tab may have changed them.
export const marked = () => new Map(kept("marked", []));
export function mark(sampleId, on, text = "") {
  const all = marked();
  if (on) all.set(sampleId, text.slice(0, 200));
  else all.delete(sampleId);
  keep("marked", [...all]);
}
export function unmark(sampleIds) {
  const all = marked();
  for (const sampleId of sampleIds) all.delete(sampleId);
  keep("marked", [...all]);
}
export const past = () => kept("history", []);
export function remember(view, value) {
  const same = JSON.stringify([view, value]);
  const others = past().filter((one) => JSON.stringify([one.view, one.value]) !== same);
  keep("history", [{ view, value, at: new Date().toISOString() }, ...others].slice(0, 100));
}
export const forget = () => keep("history", []);
