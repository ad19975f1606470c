/* Turn text into JSON with the student in this folder, in a browser or in Node 20; no build step.

     import { Student } from './device/student.js';
     const student = await Student.load();          // from the folder that holds student.js
     await student.label(['you are great']);        // [{ sentiment: 'positive', ... }]
     await student.label(texts, { confidence: 'full' });  // and the probability of every value

     node student.js < texts.txt                    // one JSON line per input line
     node student.js --confidence < texts.txt       // and a probability per field; =full: per value

   It does what run.py does, which explains decoding step by step; the names are the same, in camelCase.
   It needs the npm packages that device/web.py puts into npm/: onnxruntime-web, @huggingface/tokenizers. */

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
    const [ort, { Tokenizer }, task, tokenizer, graph, wasm] = await Promise.all([
      importPackage('ort.wasm.bundle.min.mjs'), importPackage('tokenizers.min.mjs'),
      readJson('task.json'), readJson('tokenizer.json'),
      readFile('student.onnx'), readFile('npm/ort-wasm-simd-threaded.wasm.gz'),
    ]);
    if (task.format !== 4) {
      throw new Error(`this folder has format ${task.format}, this student.js reads 4; export it again`);
    }
    sizes['student.onnx'] = graph.length;
    for (const [name, size] of Object.entries(task.bytes)) {
      if (sizes[name] !== size) {
        throw new Error(`${name} is not from this export, or incomplete; load again, or export it again`);
      }
    }
    student.task = task;
    student.temperature = new Map(task.leaves.map((leaf) => [leaf.path, leaf.temperature]));
    student.ort = ort;
    student.tokenizer = new Tokenizer(tokenizer, {});
    ort.env.wasm.numThreads = 1; // more threads need a server that isolates the page
    ort.env.wasm.wasmBinary = await gunzip(wasm);
    try {
      student.session = await ort.InferenceSession.create(graph, { executionProviders: ['wasm'] });
    } catch (error) {
      const reason = String(error.message).slice(0, 120);
      throw new Error(`student.onnx cannot be loaded (${reason}); export it again`);
    }
    return student;
  }

  /** a text -> its ids; every run of whitespace counts as one space, half a surrogate pair as ? */
  encode(text) {
    const clean = text.replace(/\p{Surrogate}/gu, '?').split(SPACES).filter(Boolean).join(' ');
    return clean ? this.tokenizer.encode(clean, { add_special_tokens: false }).ids : [];
  }

  /** B lists of ids, and the B answers so far -> for each the logits (V,) of its next token, in one forward
      pass. */
  async computeLogits(texts, answers) {
    const pad = (rows) => {
      const T = Math.max(2, ...rows.map((row) => row.length));
      const ids = new BigInt64Array(rows.length * T).fill(-1n); // (B, T), -1 on padding
      rows.forEach((row, n) => row.forEach((id, t) => { ids[n * T + t] = BigInt(id); }));
      return new this.ort.Tensor('int64', ids, [rows.length, T]);
    };
    const { logits } = await this.session.run({ text: pad(texts), answer: pad(answers) });
    const V = logits.dims[1];
    return texts.map((_, n) => Array.from(logits.data.subarray(n * V, (n + 1) * V)));
  }

  /** lists of ids -> for each text Map(state -> { answer, logits, choice }): the answer before the decision,
      the logits of its legal tokens, the index of the token chosen. */
  async decide(texts) {
    const answers = texts.map(() => this.task.start);
    const state = texts.map(() => 0);
    const decisions = texts.map(() => new Map());
    for (;;) {
      const unfinished = state.flatMap((s, n) => (s >= 0 ? [n] : []));
      if (!unfinished.length) return decisions;
      const all = await this.computeLogits(unfinished.map((n) => texts[n]), unfinished.map((n) => answers[n]));
      unfinished.forEach((n, i) => {
        const choices = this.task.states[state[n]];
        const logits = choices.rows.map((v) => all[i][v]); // of V only the legal ones
        const choice = logits.indexOf(Math.max(...logits));
        decisions[n].set(state[n], { answer: answers[n], logits, choice });
        answers[n] = [...answers[n], ...choices.read[choice]]; // the token chosen and the forced ones after it
        state[n] = choices.next[choice]; // -1: the answer is complete
      });
    }
  }

  /** the probabilities of the legal tokens of a state. */
  probabilities(state, logits) {
    return softmax(logits, this.temperature.get(this.task.states[state].field));
  }

  /** the decisions of an answer -> [{ options: of a fork, taken: one of them }], in the order of the answer. */
  walk(decisions) {
    const walked = [];
    for (let n = 0; n >= 0; n = walked.at(-1).taken.next) { // -1: the answer is complete
      const options = this.task.forks[n];
      const agrees = ([state, rows]) => rows.includes(decisions.get(state)?.choice);
      walked.push({ options, taken: options.find(({ steps }) => steps.every(agrees)) });
    }
    return walked;
  }

  /** Map(number of a choice -> probabilities of its values) for a text (its ids), of the choices that the answer comes
      to, given its own answers before; see run.py. Decisions that are not on the answer's own path cost one more
      forward pass. */
  async valueProbabilities(text, decisions, walked) {
    const known = new Map([...decisions].map(([state, { logits }]) => [state, this.probabilities(state, logits)]));
    const missing = new Map(); // for each decision that the answer did not meet: the answer before it
    for (const { steps } of walked.flatMap(({ options }) => options)) {
      let { answer } = decisions.get(steps[0][0]); // all options of a fork start at the same decision
      for (const [state, rows] of steps) {
        if (!known.has(state)) missing.set(state, answer);
        answer = [...answer, ...this.task.states[state].read[rows[0]]];
      }
    }
    if (missing.size) {
      const answers = [...missing.values()];
      const all = await this.computeLogits(answers.map(() => text), answers);
      [...missing.keys()].forEach((state, n) => {
        known.set(state, this.probabilities(state, this.task.states[state].rows.map((v) => all[n][v])));
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

  /** a text (its ids) and its decisions -> its answer. */
  async makeRecord(text, decisions, { confidence = false, minConfidence = 0, chosen = false }) {
    const walked = this.walk(decisions);
    const written = this.task.text + walked.map(({ taken }) => taken.text).join('');
    const answer = JSON.parse(written.trim().replace(/^```json/, '').replace(/```$/, ''));
    const pOfField = Object.fromEntries(this.task.leaves.map((leaf) => [leaf.path, 1]));
    for (const [state, { logits, choice }] of decisions) {
      pOfField[this.task.states[state].field] *= this.probabilities(state, logits)[choice];
    }
    if (confidence === 'full') {
      answer._confidence = this.showValues(await this.valueProbabilities(text, decisions, walked));
    } else if (confidence) {
      answer._confidence = Object.fromEntries(Object.entries(pOfField).map(([path, p]) => [path, round4(p)]));
    }
    if (Math.min(...Object.values(pOfField)) < minConfidence) answer._defer = true;
    return chosen ? { ...answer, _chosen: this.showChosen(walked) } : answer;
  }

  /** texts -> records, in their order. options: confidence (true or 'full'), minConfidence, and chosen (true adds
      _chosen: { path: names of the values that the answer has }, with the paths of 'full'). */
  async label(texts, options = {}) {
    const ids = texts.map((text) => this.encode(text));
    const problem = this.temperature.has('error') ? '_error' : 'error';
    const records = ids.map((row) => (row.length ? null : { [problem]: 'empty text' }));
    const order = ids.flatMap((row, n) => (row.length ? [n] : []));
    order.sort((a, b) => ids[a].length - ids[b].length); // texts of similar length are read together
    for (let at = 0; at < order.length; at += BATCH) {
      const batch = order.slice(at, at + BATCH);
      const { before, after, max_text: most, keep_end: keepEnd } = this.task;
      const part = keepEnd ? [-most] : [0, most];
      const cut = batch.map((n) => [...before, ...ids[n].slice(...part), ...after]);
      const decisions = await this.decide(cut);
      for (let i = 0; i < batch.length; i++) {
        records[batch[i]] = await this.makeRecord(cut[i], decisions[i], options);
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
