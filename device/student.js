/* Turn text into JSON with the student in this folder, in a browser or in Node 20; no build step.

     import { Student } from './device/student.js';
     const student = await Student.load();          // from the folder that holds student.js
     await student.label(['you are great']);        // [{ sentiment: 'positive', ... }]
     await student.label(texts, { confidence: 'full' });  // and the probability of every value

     node student.js < texts.txt                    // one JSON line per input line
     node student.js --confidence < texts.txt       // and a probability per field; =full: per value

   It does what run.py does, which explains decoding step by step; the names are the same, in camelCase.
   It needs the npm packages that device/web.py puts into npm/: onnxruntime-web, @huggingface/tokenizers. */
import { Page, WordPiece } from './places.js';

const BATCH = 32; // texts that are read together
// what Python's str.split() counts as whitespace; JavaScript's \s differs in a few characters
const SPACES = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u;

/** URL of a file -> its bytes. Node's fetch reads no files, so a file: URL has a branch of its own. */
async function readBytes(url) {
  if (url.protocol === 'file:') {
    const { readFile } = await import('node:fs/promises');
    return new Uint8Array(await readFile(url));
  }
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} cannot be read (${response.status})`);
  return new Uint8Array(await response.arrayBuffer());
}

async function gunzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const sum = (x) => x.reduce((a, b) => a + b, 0);

function softmax(x, temperature) {
  const max = Math.max(...x);
  const e = x.map((v) => Math.exp((v - max) / temperature));
  const total = sum(e);
  return e.map((v) => v / total);
}

/** the number of the likeliest of the first nTokens logits; of the likeliest place, if the places behind them are
    together likelier: whether a value is copied is one decision, where is another. */
function choose(logits, nTokens) {
  const tokens = logits.slice(0, nTokens), places = logits.slice(nTokens);
  const best = Math.max(...tokens), place = Math.max(...places); // of none: -Infinity
  const together = place + Math.log(sum(places.map((v) => Math.exp(v - place))));
  return together > best ? nTokens + places.indexOf(place) : tokens.indexOf(best);
}

/** a copied value as JSON, a string without its quotes, which the text around it has. */
const innerText = (value) => (typeof value === 'string' ? JSON.stringify(value).slice(1, -1) : JSON.stringify(value));

const round4 = (p) => Math.round(p * 1e4) / 1e4;

export class Student {
  /** url: of another folder. progress: called with (bytes loaded so far, name of the file).
      Throws an Error with a message if the folder is damaged, incomplete, or of another format. */
  static async load(url = '.', { progress = () => {} } = {}) {
    const folder = new URL(url, import.meta.url);
    if (!folder.pathname.endsWith('/')) folder.pathname += '/';
    const student = new Student();
    student.bytes = 0;
    const readFile = async (name) => {
      const bytes = await readBytes(new URL(name, folder));
      student.bytes += bytes.length;
      progress(student.bytes, name);
      return bytes;
    };
    const sizes = {};
    const readJson = async (name) => {
      const bytes = await readFile(name);
      sizes[name] = bytes.length;
      try {
        return JSON.parse(new TextDecoder().decode(bytes));
      } catch {
        throw new Error(`${name} is damaged; export it again`);
      }
    };
    const importPackage = (name) => import(new URL(`npm/${name}`, folder)).catch(() => {
      throw new Error('npm/ is missing here; python device/web.py --serve=False puts it there');
    });
    const taskRead = readJson('task.json');
    const readGraph = async (name) => {
      if (!(name in (await taskRead).bytes)) return null;
      const graph = await readFile(name);
      sizes[name] = graph.length;
      return graph;
    };
    const [ort, { Tokenizer }, task, tokenizer, graph, reader, wasm] = await Promise.all([
      importPackage('ort.wasm.bundle.min.mjs'), importPackage('tokenizers.min.mjs'),
      taskRead, readJson('tokenizer.json'),
      readGraph('student.onnx'), readGraph('reader.onnx'), readFile('npm/ort-wasm-simd-threaded.wasm.gz'),
    ]);
    if (task.format !== 5) {
      throw new Error(`this folder has format ${task.format}, this student.js reads 5; export it again`);
    }
    for (const [name, size] of Object.entries(task.bytes)) {
      if (sizes[name] !== size) {
        throw new Error(`${name} is not from this export, or incomplete; load again, or export it again`);
      }
    }
    student.task = task;
    student.temperature = new Map(task.leaves.map((leaf) => [leaf.path, leaf.temperature]));
    student.ort = ort;
    student.tokenizer = task.copied.length ? new WordPiece(tokenizer) : new Tokenizer(tokenizer, {});
    ort.env.wasm.numThreads = 1; // more threads need a server that isolates the page
    ort.env.wasm.wasmBinary = await gunzip(wasm);
    const open = (bytes) => ort.InferenceSession.create(bytes, { executionProviders: ['wasm'] });
    try {
      student.session = await open(graph);
      student.reader = reader && await open(reader);
    } catch (error) {
      const reason = String(error.message).slice(0, 120);
      throw new Error(`student.onnx cannot be loaded (${reason}); export it again`);
    }
    return student;
  }

  /** a text -> { clean: the same, in which every run of whitespace counts as one space, and half a surrogate pair as ?;
      ids, and offsets if values are copied } */
  encode(text) {
    const clean = text.replace(/\p{Surrogate}/gu, '?').split(SPACES).filter(Boolean).join(' ');
    return clean ? { clean, ...this.tokenizer.encode(clean, { add_special_tokens: false }) } : { clean, ids: [] };
  }

  /** what encode returns -> a text that is being answered. ids: as many of its tokens as fit, and what stands around
      them; states (T, C): what an encoder has read; page: where its values can stand; copied: { part, first, last } of
      those written, the first and the last token of each; a part is one of task.copied; first: the first token of the
      one that is begun, or null. */
  openText({ clean, ids, offsets }) {
    const { before, after, max_text: most, keep_end: keepEnd, copied } = this.task;
    const cut = (row, start, end) => [...start, ...(keepEnd ? row.slice(-most) : row.slice(0, most)), ...end];
    const nothing = (row) => row.map(() => [0, 0]);
    const page = copied.length ? new Page(clean, cut(offsets, nothing(before), nothing(after)), this.task) : null;
    return { clean, ids: cut(ids, before, after), page, copied: [], first: null };
  }

  /** the tokens of a text that may be chosen now, in a decision on a copied value. */
  placesOf({ page, copied, first }, part) {
    if (first !== null) return page.lasts(part, first);
    const alike = copied.filter((other) => part.list !== null && other.part.list === part.list);
    return page.firsts(part, alike.map((other) => other.first));
  }

  /** chooses the first or the last token of a value. */
  point(text, part, token) {
    if (text.first === null) text.first = token;
    else {
      text.copied.push({ part, first: text.first, last: token });
      text.first = null;
    }
  }

  /** B lists of ids -> a tensor (B, T), at least two wide, with -1 on padding. */
  pad(rows) {
    const T = Math.max(2, ...rows.map((row) => row.length));
    const ids = new BigInt64Array(rows.length * T).fill(-1n);
    rows.forEach((row, n) => row.forEach((id, t) => { ids[n * T + t] = BigInt(id); }));
    return new this.ort.Tensor('int64', ids, [rows.length, T]);
  }

  /** lets the encoder, if there is one, read texts of openText, in one forward pass. */
  async read(texts) {
    if (!this.reader) return;
    const { states } = await this.reader.run({ text: this.pad(texts.map(({ ids }) => ids)) });
    const [, T, C] = states.dims;
    texts.forEach((text, n) => {
      text.states = states.data.slice(n * T * C, (n * T + text.ids.length) * C); // (T, C)
    });
  }

  /** B texts of openText, and the B answers so far -> for each the logits (V,) of its next token, in one forward pass;
      (V + 1 + T,) if values are copied. */
  async computeLogits(texts, answers) {
    const feed = { text: this.pad(texts.map(({ ids }) => ids)), answer: this.pad(answers) };
    if (this.reader) {
      const [B, T] = feed.text.dims, C = texts[0].states.length / texts[0].ids.length;
      const states = new Float32Array(B * T * C);
      texts.forEach((text, n) => states.set(text.states, n * T * C));
      feed.states = new this.ort.Tensor('float32', states, [B, T, C]);
    }
    const { logits } = await this.session.run(feed);
    const V = logits.dims[1];
    return texts.map((_, n) => Array.from(logits.data.subarray(n * V, (n + 1) * V)));
  }

  /** texts of openText -> for each Map(state -> { answer, option, logits, chosen }): the answer before the decision;
      which of the legal tokens was chosen, or their number for a place; the logits of the legal tokens, then of the
      legal places; which of these was chosen. */
  async decide(texts) {
    const answers = texts.map(() => this.task.start);
    const state = texts.map(() => 0);
    const decisions = texts.map(() => new Map());
    for (;;) {
      const unfinished = state.flatMap((s, n) => (s >= 0 ? [n] : []));
      if (!unfinished.length) return decisions;
      const all = await this.computeLogits(unfinished.map((n) => texts[n]), unfinished.map((n) => answers[n]));
      unfinished.forEach((n, i) => {
        const choices = this.task.states[state[n]], nTokens = choices.rows.length;
        const [logits, places] = this.legalLogits(choices, all[i], texts[n]);
        const chosen = choose(logits, nTokens), option = Math.min(chosen, nTokens);
        decisions[n].set(state[n], { answer: answers[n], option, logits, chosen });
        let read = choices.read[option]; // the token chosen and the forced ones after it
        if (option === nTokens) {
          const token = places[chosen - nTokens];
          this.point(texts[n], this.task.copied[choices.copies], token);
          read = [this.task.first_place + 2 * token + (texts[n].first === null)]; // an odd one: the last token of a value
        }
        answers[n] = [...answers[n], ...read];
        state[n] = choices.next[option]; // -1: the answer is complete
      });
    }
  }

  /** [the logits of a decision's legal tokens, then of its legal places; these places]. row: all logits. A number or a
      date is written only if the text has one, unless nothing else is legal: then it is null. */
  legalLogits(choices, row, text) {
    const logits = choices.rows.map((v) => row[v]); // of V only the legal ones
    if ('copies' in choices) {
      let places = this.placesOf(text, this.task.copied[choices.copies]);
      if (!places.length && !logits.length) places = [0];
      return [[...logits, ...places.map((place) => row[this.task.first_place + place])], places];
    }
    const isLacking = choices.needs?.map((kinds) => !kinds.every((kind) => text.page.spans(kind).length));
    return [isLacking && !isLacking.every(Boolean) ? logits.map((x, n) => (isLacking[n] ? -Infinity : x)) : logits, []];
  }

  /** the probabilities of the legal tokens of a state, and of its legal places. */
  probabilities(state, logits) {
    return softmax(logits, this.temperature.get(this.task.states[state].field));
  }

  /** the same, those of all places being one. */
  optionProbabilities(state, logits) {
    const p = this.probabilities(state, logits), { rows, copies } = this.task.states[state];
    return copies === undefined ? p : [...p.slice(0, rows.length), sum(p.slice(rows.length))];
  }

  /** the decisions of an answer -> [{ options: of a fork, taken: one of them }], in the order of the answer. */
  walk(decisions) {
    const walked = [];
    for (let n = this.task.forks.length ? 0 : -1; n >= 0; n = walked.at(-1).taken.next) { // -1: the answer is complete
      const options = this.task.forks[n];
      const agrees = ([state, rows]) => rows.includes(decisions.get(state)?.option);
      walked.push({ options, taken: options.find(({ steps }) => steps.every(agrees)) });
    }
    return walked;
  }

  /** Map(number of a choice -> probabilities of its values) for a text, of the choices that the answer comes
      to, given its own answers before; see run.py. Decisions that are not on the answer's own path cost one more
      forward pass. */
  async valueProbabilities(text, decisions, walked) {
    const known = new Map();
    for (const [state, { logits }] of decisions) known.set(state, this.optionProbabilities(state, logits));
    const missing = new Map(); // for each decision that the answer did not meet: the answer before it
    for (const { steps } of walked.flatMap(({ options }) => options)) {
      let { answer } = decisions.get(steps[0][0]); // all options of a fork start at the same decision
      for (const [state, rows] of steps) {
        if (!known.has(state)) missing.set(state, answer);
        answer = [...answer, ...this.task.states[state].read[rows[0]] ?? []]; // behind a place an option has no step
      }
    }
    if (missing.size) {
      const answers = [...missing.values()];
      const all = await this.computeLogits(answers.map(() => text), answers);
      [...missing.keys()].forEach((state, n) => {
        const places = 'copies' in this.task.states[state] ? text.page.firsts({ kind: 'text' }) : [];
        const rows = [...this.task.states[state].rows, ...places.map((place) => this.task.first_place + place)];
        known.set(state, this.optionProbabilities(state, rows.map((v) => all[n][v])));
      });
    }
    const result = new Map();
    this.task.choices.forEach(({ names }, n) => { if (names.length === 1) result.set(n, [1]); });
    for (const { options, taken } of walked) {
      const share = (state, rows) => sum(rows.map((n) => known.get(state)[n]));
      const p = options.map(({ steps }) => steps.reduce((product, [state, rows, possible]) => (
        product * share(state, rows) / (possible ? share(state, possible) : 1)), 1));
      taken.made.forEach(([choice], i) => {
        const sums = this.task.choices[choice].names.map(() => 0);
        options.forEach(({ made }, n) => {
          const alike = taken.made.slice(0, i).every((own, k) => own[0] === made[k]?.[0] && own[1] === made[k][1]);
          if (alike) sums[made[i][1]] += p[n];
        });
        result.set(choice, sums.map((q) => q / sum(sums)));
      });
    }
    return result;
  }

  /** what valueProbabilities returns, as the record has it. */
  showValues(pValues) {
    const shown = {};
    this.task.choices.forEach(({ path, names, of }, n) => {
      if (!pValues.has(n)) return;
      if (of) (shown[of[0]] ??= {})[of[1]] = round4(pValues.get(n)[1]);
      else shown[path] = Object.fromEntries(pValues.get(n).map((p, k) => [names[k], round4(p)]));
    });
    return shown;
  }

  /** an answer -> { path: names of the values that it has }; of a list of values: of those in it. */
  showChosen(walked) {
    const made = new Map(walked.flatMap(({ taken }) => taken.made)), shown = {};
    this.task.choices.forEach(({ path, names, of }, n) => {
      if (names.length === 1) made.set(n, 0);
      if (!made.has(n)) return;
      if (of) (shown[of[0]] ??= []).push(...(made.get(n) ? [of[1]] : []));
      else shown[path] = [names[made.get(n)]];
    });
    return shown;
  }

  /** a text and its decisions -> [{ path, start, end, value, p }] of its copied values: the characters at which each
      stands, and the probability of that. */
  showCopied(text, decisions) {
    const p = [...decisions].flatMap(([state, { option, logits, chosen }]) => (
      option < this.task.states[state].rows.length ? [] : [this.probabilities(state, logits)[chosen]]));
    return text.copied.map(({ part, first, last }, n) => (
      { path: part.path, ...text.page.span(part, first, last), p: round4(p[2 * n] * p[2 * n + 1]) }));
  }

  /** a text and its decisions -> its answer. */
  async makeRecord(text, decisions, { confidence = false, minConfidence = 0, chosen = false }) {
    const walked = this.walk(decisions);
    let written = this.task.text + walked.map(({ taken }) => taken.text).join('');
    if (this.task.copied.length) {
      const values = text.copied.map(({ part, first, last }) => text.page.span(part, first, last).value);
      written = written.replace(/[\u{100000}-\u{10ffff}]/gu, () => innerText(values.shift()));
    }
    const answer = JSON.parse(written.trim().replace(/^```json/, '').replace(/```$/, ''));
    const pOfField = Object.fromEntries(this.task.leaves.map((leaf) => [leaf.path, 1]));
    for (const [state, made] of decisions) {
      pOfField[this.task.states[state].field] *= this.probabilities(state, made.logits)[made.chosen];
    }
    if (confidence === 'full') {
      answer._confidence = this.showValues(await this.valueProbabilities(text, decisions, walked));
    } else if (confidence) {
      answer._confidence = Object.fromEntries(Object.entries(pOfField).map(([path, p]) => [path, round4(p)]));
    }
    if (Math.min(...Object.values(pOfField)) < minConfidence) answer._defer = true;
    if (!chosen) return answer;
    const shown = { _chosen: this.showChosen(walked), _copied: this.showCopied(text, decisions), _text: text.clean };
    return { ...answer, ...shown };
  }

  /** texts -> records, in their order. options: confidence (true or 'full'), minConfidence, and chosen (true adds
      _chosen: { path: names of the values that the answer has }, with the paths of 'full', _copied: see showCopied, and
      _text: the clean text whose characters it counts). */
  async label(texts, options = {}) {
    const encoded = texts.map((text) => this.encode(text));
    const problem = this.temperature.has('error') ? '_error' : 'error';
    const records = encoded.map(({ clean }) => (clean ? null : { [problem]: 'empty text' }));
    const order = encoded.flatMap(({ clean }, n) => (clean ? [n] : []));
    order.sort((a, b) => encoded[a].ids.length - encoded[b].ids.length); // texts of similar length are read together
    for (let at = 0; at < order.length; at += BATCH) {
      const batch = order.slice(at, at + BATCH);
      const opened = batch.map((n) => this.openText(encoded[n]));
      await this.read(opened);
      const decisions = await this.decide(opened);
      for (let i = 0; i < batch.length; i++) {
        records[batch[i]] = await this.makeRecord(opened[i], decisions[i], options);
      }
    }
    return records;
  }
}

/** the command-line program: lines from standard input, JSON lines to standard output. */
async function main(args) {
  const flags = { '--confidence': true, '--confidence=full': 'full' };
  const wrong = args.find((arg) => !(arg in flags));
  if (wrong || process.stdin.isTTY) {
    const problem = wrong ? `cannot read ${wrong}` : 'nothing to label';
    throw new Error(`${problem}; run: node student.js [--confidence[=full]] < texts.txt`);
  }
  const student = await Student.load();
  const printLabels = async (lines) => {
    const records = await student.label(lines, { confidence: flags[args[0]] });
    process.stdout.write(records.map((record) => `${JSON.stringify(record)}\n`).join(''));
  };
  const decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  let rest = '';
  for await (const part of process.stdin) {
    const lines = (rest + decoder.decode(part, { stream: true })).split('\n');
    rest = lines.pop();
    await printLabels(lines);
  }
  rest += decoder.decode();
  if (rest) await printLabels([rest]);
}

if (globalThis.process?.argv?.[1]) { // in Node: main() runs only if this file was started, not imported
  const [{ realpathSync }, { pathToFileURL }] = await Promise.all([import('node:fs'), import('node:url')]);
  if (import.meta.url === pathToFileURL(realpathSync(process.argv[1])).href) {
    process.stdout.on('error', () => process.exit()); // the reader closed the pipe
    await main(process.argv.slice(2)).catch((error) => {
      console.error(error.message);
      process.exitCode = 1;
    });
  }
}
