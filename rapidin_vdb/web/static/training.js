// Training files without the marked samples: from the database, or from the file that was ingested.
import { Refused, during, follow, say } from "./server.js";

const { make } = Heat;
const id = (name) => document.getElementById(name);
const counted = (count, one, many) => count.toLocaleString("en") + " " + (count === 1 ? one : many);

export function save(name, parts) {
  const link = make("a", { download: name });
  link.href = URL.createObjectURL(new Blob(parts, { type: "application/x-ndjson" }));
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

let left = null; // the ids without which a file waits to be saved
export function forgotten() {
  left = null;
  id("to-save").replaceChildren();
}
// What is shown is what is left out: where something else is marked by now, that file is no more to be had.
export function outdated(ids) {
  if (left === null || (left.length === ids.length && left.every((name, place) => name === ids[place]))) return;
  forgotten();
  id("to-save").append(make("p", { class: "soft" }, "What is marked has changed since: save the samples again."));
}

// Marks are of texts: nothing is done by the ids of samples that have others by now. Where that is so the server says it.
async function checked(marks, signal) {
  let some = [], room = 8000; // of characters, in a filter
  const ask = async () => {
    const names = some.map((mark) => "'" + (mark.sample_id ?? mark).replaceAll("'", "''") + "'");
    if (some.length) await follow("api/export", { without: some, where: "sample_id IN (" + names.join(", ") + ")" }, signal);
    [some, room] = [[], 8000];
  };
  for (const mark of marks) {
    room -= 2 * (mark.sample_id ?? mark).length + 4;
    if (room < 0) await ask();
    some.push(mark);
  }
  await ask();
}
export function savedIds(marks) {
  during("looking at what is marked", async (signal) => {
    await checked(marks, signal);
    save("marked.jsonl", marks.map((mark) => JSON.stringify({ id: mark.sample_id ?? mark }) + "\n"));
    say("Saved marked.jsonl: " + marks.length + " ids.");
  });
}

// What the database still knows. Where that is not all of a record it is said before, not after.
export function exported(where, without, names) {
  during("writing the cleaned file", async (signal) => {
    forgotten();
    const parts = [];
    const { records, inexact_records: inexact, matching } = await follow("api/export", { without, where }, signal, (part) => parts.push(part));
    const keep = () => {
      save("cleaned.jsonl", parts);
      forgotten();
      say("Saved cleaned.jsonl: " + counted(records, "sample", "samples") + ". Of the " + matching.toLocaleString("en") + " that match, " + (matching - records).toLocaleString("en") + " are marked and left out.");
    };
    if (!inexact) return keep();
    left = names;
    id("to-save").append(make("p", {}, counted(inexact, "record", "records") + " of " + records.toLocaleString("en") + " cannot be restored exactly: lists, objects, or the turns of a conversation may be lost. Better give your own training file above."),
      make("button", { type: "button", onclick: keep }, "Save it all the same"));
    say("Not saved yet.");
  });
}

// The lines of a file whose id is not marked, byte for byte.
export function cleaned(file, field, marks) {
  during("reading the file", async (signal) => {
    await checked(marks, signal);
    const marked = new Set(marks.map((mark) => mark.sample_id ?? mark));
    const kept = [], left = new Set(marked);
    let lines = 0, gone = 0, nameless = 0, from = 0;
    await eachLine(file, signal, (start, end, text) => {
      if (!text.trim()) return;
      lines += 1;
      const name = idOf(text, field, lines);
      if (name === undefined) nameless += 1;
      if (!marked.has(name)) return;
      gone += 1;
      left.delete(name);
      if (from < start) kept.push(file.slice(from, start));
      from = end;
    });
    kept.push(file.slice(from));
    const name = "cleaned-" + file.name, without = nameless ? " " + counted(nameless, "line has", "lines have") + " no id in the field " + field + ": such a sample is named after its content, so that this page cannot tell whether it is marked; they are all still there." : "";
    const missing = left.size ? " " + counted(left.size, "marked sample is", "marked samples are") + " not in the file." : "";
    if (!gone) throw new Refused("Nothing is saved: no line of " + file.name + " has the id of a marked sample." + without);
    save(name, kept);
    say("Saved " + name + ": " + (lines - gone).toLocaleString("en") + " of " + counted(lines, "line", "lines") + "." + missing + without);
  });
}
function idOf(text, field, line) {
  let record;
  try {
    record = JSON.parse(text);
  } catch {
    record = null;
  }
  if (typeof record !== "object" || record === null || Array.isArray(record))
    throw new Refused("Line " + line + " of the file is no JSON object: only a file of JSON lines, not compressed, can be cleaned here.");
  const value = Object.hasOwn(record, field) ? record[field] : undefined;
  // A number that this language cannot hold exactly names no sample.
  return typeof value === "string" && value !== "" ? value : Number.isSafeInteger(value) ? String(value) : undefined;
}
async function eachLine(file, signal, told) {
  const reader = file.stream().getReader();
  let held = [], start = 0, place = 0;
  const line = (end) => {
    told(start, end, new TextDecoder().decode(joined(held)));
    held = [];
    start = end;
  };
  for (;;) {
    signal.throwIfAborted();
    const { value, done } = await reader.read();
    if (done) break;
    let from = 0;
    for (let to = value.indexOf(10); to >= 0; to = value.indexOf(10, from)) {
      held.push(value.subarray(from, to + 1));
      from = to + 1;
      line(place + from);
    }
    held.push(value.subarray(from));
    place += value.length;
  }
  if (start < place) line(place);
}
function joined(parts) {
  const all = new Uint8Array(parts.reduce((length, part) => length + part.length, 0));
  parts.reduce((at, part) => (all.set(part, at), at + part.length), 0);
  return all;
}
