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

// Id, beginning of the response, and checksum of its texts: another sample may take an id over. Read each time: another
// tab may have changed them. What changes them says whether the browser keeps it.
const marks = () => kept("marked", []);
export const marked = () => new Map(marks().map(([name, text]) => [name, text]));
export function mark(sample, on) {
  const others = marks().filter(([name]) => name !== sample.sample_id);
  return keep("marked", on ? [...others, [sample.sample_id, sample.response.slice(0, 200), sumOf(sample)]] : others);
}
export function unmark(sampleIds) {
  const gone = new Set(sampleIds);
  keep("marked", marks().filter(([name]) => !gone.has(name)));
}
// As an export wants them; those of before there were checksums go by id alone.
export const unwanted = () => marks().map(([name, , sum]) => (sum === undefined ? name : { sample_id: name, crc32: sum }));

const BYTES = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit += 1) byte = byte & 1 ? 0xedb88320 ^ (byte >>> 1) : byte >>> 1;
  return byte;
});
// CRC-32, of which no browser has one.
function sumOf({ prompt, response }) {
  let sum = -1;
  for (const byte of new TextEncoder().encode((prompt ?? "") + "\0" + response)) sum = BYTES[(sum ^ byte) & 255] ^ (sum >>> 8);
  return ~sum >>> 0;
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
