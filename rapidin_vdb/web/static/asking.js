// Asking in steps: the ranking stands as soon as it is there; what takes longer comes after it, and may come to nothing.
import { Damaged, STAGES, follow, say, wordsOf } from "./server.js";
import { areTurns, messagesOf } from "./turns.js";

const known = new Map(); // answers of late, so that back and forward need not ask again
const anew = new Set(); // keys of what is asked again though its answer is known: what was ingested since counts
const CHEAP = 5; // seconds of which nobody needs to be asked whether they are worth it
// Each step's answer holds that of the one before.
const STEPS = { ranking: [false, false], words: [true, false], matrix: [true, true] };
// What takes a step longest, as the server names it.
const LONGEST = { words: "tokens", matrix: "matrix" };

// A question as a link may have it: with what is usual where it says nothing.
export function completed(given) {
  if (typeof given !== "object" || given === null) throw new Damaged();
  const usual = { turns: [], prompt: "", generated: "", where: "", top_k: "10", ends: "helpful", group_by: "", tokens: true, focus: [] }, values = { ...usual, ...given };
  for (const name of Object.keys(usual)) if (typeof values[name] !== typeof usual[name] || Array.isArray(values[name]) !== Array.isArray(usual[name])) throw new Damaged();
  if (!areTurns(values.turns)) throw new Damaged();
  if (!values.turns.length) delete values.turns; // as in what was asked before there were any
  return values;
}

function requestOf(values, step) {
  const [tokens, matrix] = STEPS[step];
  return {
    ...(values.turns ? { messages: messagesOf(values) } : { prompt: values.prompt === "" ? null : values.prompt }), generation: values.generated, where: values.where.trim() || null,
    top_k: Number(values.top_k), harmful: values.ends === "harmful", both: values.ends === "both", group_by: values.group_by || null,
    tokens, matrix, focus: values.focus, histogram: 60,
  };
}
const asked = (values, step, signal) => follow("api/query?pieces=true", requestOf(values, step), signal);

export const keyOf = (values) => JSON.stringify([requestOf(values, "ranking"), values.tokens]);
export const again = (values) => anew.add(keyOf(values));

// The answer of late, or a new one, of which only the ranking is there yet. `fresh` says whether it is new.
export async function ranked(values, signal) {
  const key = keyOf(values);
  let fresh = false;
  if (anew.delete(key) || !known.has(key)) {
    const started = performance.now(), ranking = await asked(values, "ranking", signal);
    known.delete(key); // so that it is the youngest
    known.set(key, { values, ranking, seconds: (performance.now() - started) / 1000, chosen: new Set(), driven: null, lacks: null, unfolded: {} });
    if (known.size > 12) known.delete(known.keys().next().value);
    fresh = true;
  }
  const answer = known.get(key);
  answer.lacks = null;
  return { answer, fresh };
}

export const resultsOf = ({ ranking }) => [...ranking.results, ...(ranking.harmful || [])];
// Where each sample stands, and at which end where there are both.
export function placesOf({ results, harmful }) {
  const placed = (some, end) => some.map((result) => [result.sample_id, { rank: result.rank, end }]);
  return new Map([...placed(results, harmful ? "helpful" : ""), ...placed(harmful || [], "harmful")]);
}
export const hasWords = (answer) => Boolean(answer.ranking.pieces);
export const hasMatrix = (answer) => resultsOf(answer).some((result) => result.matrix);
const pressed = (answer) => answer.chosen.size > 0 || answer.driven !== null;

// What an answer needs next, if anything: which words drive which takes a step for each word of the generation, so that it
// waits until a word is pressed, unless it is cheap.
function next(answer) {
  if (answer.lacks || !answer.values.tokens || !resultsOf(answer).length) return null;
  if (!hasWords(answer)) return "words";
  const cheap = answer.ranking.generation_tokens.length * answer.ranking.seconds.tokens <= CHEAP;
  return !hasMatrix(answer) && (pressed(answer) || cheap) ? "matrix" : null;
}

let under = null; // the signal of what is under way
export const wanting = (answer) => next(answer) !== null && (under === null || under.aborted);
// `shown` is called whenever there is more to be seen. What comes to nothing is said in the answer, which stays, and does
// not keep the others from theirs; the first of such errors is thrown in the end.
export async function complete(answers, signal, shown) {
  under = signal;
  let answer, failed = null;
  try {
    while ((answer = answers.find((one) => next(one) === "words") || answers.find(next))) {
      const step = next(answer); // what is pressed meanwhile changes what comes next
      try {
        if (!signal.aborted) say(STAGES[LONGEST[step]], "busy");
        const ranking = await asked(answer.values, step, signal);
        signal.throwIfAborted();
        answer.ranking = (answer.known || answer).ranking = ranking;
      } catch (error) {
        answer.lacks = { step, why: error.name === "AbortError" ? "Stopped." : wordsOf(error) };
        failed ??= error;
      }
      shown();
    }
  } finally {
    if (under === signal) under = null;
  }
  if (failed) throw failed;
}
