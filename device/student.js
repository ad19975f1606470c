/* Turn text into JSON with the student in this folder, in a browser or in Node 20; no build step.

     import { Student } from './device/student.js';
     const student = await Student.load();          // from the folder that student.js is in
     await student.label(['you are great']);        // [{ sentiment: 'positive', ... }]
     await student.label(texts, { confidence: 'full' });  // and the probability of every value

     node student.js < texts.txt                    // one JSON line per line in; --confidence, --confidence=full

   It does what run.py does, which is written to be read; the names are the same. Needs the npm parts that
   device/web.py puts into npm/: onnxruntime-web and @huggingface/tokenizers. */

const BATCH = 32; // texts read together
// what Python's str.split() takes for whitespace; JavaScript's \s differs in a few
const SPACES = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u;

/** the bytes of a file beside this one; Node's fetch reads no files. */
async function bytesOf(url) {
  if (url.protocol === 'file:') {
    const { readFile } = await import('node:fs/promises');
    return new Uint8Array(await readFile(url));
  }
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} cannot be read (${answer.status})`);
  return new Uint8Array(await answer.arrayBuffer());
}

async function unpack(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function softmax(x, temperature) {
  const top = Math.max(...x);
  const e = x.map((v) => Math.exp((v - top) / temperature));
  const total = e.reduce((a, b) => a + b, 0);
  return e.map((v) => v / total);
}

const round4 = (p) => Math.round(p * 1e4) / 1e4;

export class Student {
  /** url: of another folder. progress: called with (bytes loaded so far, name of the file). */
  static async load(url = '.', { progress = () => {} } = {}) {
    const folder = new URL(url, import.meta.url);
    if (!folder.pathname.endsWith('/')) folder.pathname += '/';
    const student = new Student();
    student.bytes = 0;
    const get = async (name) => {
      const bytes = await bytesOf(new URL(name, folder));
      student.bytes += bytes.length;
      progress(student.bytes, name);
      return bytes;
    };
    const sizes = {};
    const parse = async (name) => {
      const bytes = await get(name);
      sizes[name] = bytes.length;
      try {
        return JSON.parse(new TextDecoder().decode(bytes));
      } catch {
        throw new Error(`${name} is damaged; export it again`);
      }
    };
    const part = (name) => import(new URL(`npm/${name}`, folder)).catch(() => {
      throw new Error('npm/ is missing here; python device/web.py --serve=False puts it there');
    });
    const [ort, { Tokenizer }, task, tokenizer, graph, wasm] = await Promise.all([
      part('ort.wasm.bundle.min.mjs'), part('tokenizers.min.mjs'),
      parse('task.json'), parse('tokenizer.json'), get('student.onnx'), get('npm/ort-wasm-simd-threaded.wasm.gz'),
    ]);
    if (task.format !== 1) {
      throw new Error(`this folder has format ${task.format}, this student.js reads 1; export it again`);
    }
    sizes['student.onnx'] = graph.length;
    for (const [name, size] of Object.entries(task.bytes)) {
      if (sizes[name] !== size) {
        throw new Error(`${name} is not of this export or not whole; load again, or export it again`);
      }
    }
    student.task = task;
    student.ort = ort;
    student.tokenizer = new Tokenizer(tokenizer, {});
    ort.env.wasm.numThreads = 1; // more need a server that isolates the page
    ort.env.wasm.wasmBinary = await unpack(wasm);
    try {
      student.session = await ort.InferenceSession.create(graph, { executionProviders: ['wasm'] });
    } catch (error) {
      throw new Error(`student.onnx is no whole student (${String(error.message).slice(0, 120)}); export it again`);
    }
    return student;
  }

  /** a text -> the ids of its tokens: whitespace of any kind as one space, half characters as ? */
  read(text) {
    const clean = text.replace(/\p{Surrogate}/gu, '?').split(SPACES).filter(Boolean).join(' ');
    return clean ? this.tokenizer.encode(clean, { add_special_tokens: false }).ids : [];
  }

  /** lists of ids -> for each the logits (V,) of what follows: one pass. */
  async logits(rows) {
    const T = Math.max(2, ...rows.map((row) => row.length));
    const ids = new BigInt64Array(rows.length * T);
    rows.forEach((row, n) => row.forEach((id, t) => { ids[n * T + t] = BigInt(id); }));
    const asked = BigInt64Array.from(rows, (row, n) => BigInt(n * T + row.length - 1));
    const { logits } = await this.session.run({
      ids: new this.ort.Tensor('int64', ids, [rows.length, T]),
      asked: new this.ort.Tensor('int64', asked, [rows.length]),
    });
    const V = logits.dims[1];
    return rows.map((_, n) => Array.from(logits.data.subarray(n * V, (n + 1) * V)));
  }

  /** lists of ids -> for each Map(state -> { before, scores, pick }). */
  async decide(texts) {
    const rows = texts.map((ids) => [...ids, ...this.task.start]);
    const state = texts.map(() => 0);
    const made = texts.map(() => new Map());
    for (;;) {
      const open = state.flatMap((s, n) => (s >= 0 ? [n] : []));
      if (!open.length) return made;
      const all = await this.logits(open.map((n) => rows[n]));
      open.forEach((n, i) => {
        const choices = this.task.states[state[n]];
        const scores = choices.rows.map((v) => all[i][v]);
        const pick = scores.indexOf(Math.max(...scores));
        made[n].set(state[n], { before: rows[n], scores, pick });
        rows[n] = [...rows[n], ...choices.read[pick]];
        state[n] = choices.next[pick];
      });
    }
  }

  /** { value: probability } of one field, given the fields before it; decisions off the way are asked too. */
  async values(field, made) {
    const ways = this.task.ways[field];
    if (!ways) return { [this.task.names[field][0]]: 1 };
    const known = new Map([...made].map(([state, { scores }]) => [state, scores]));
    const before = new Map();
    for (const way of ways) {
      let ids = made.get(way[0][0]).before;
      for (const [state, choice] of way) {
        if (!known.has(state)) before.set(state, ids);
        ids = [...ids, ...this.task.states[state].read[choice]];
      }
    }
    if (before.size) {
      const rows = await this.logits([...before.values()]);
      [...before.keys()].forEach((state, n) => known.set(state, this.task.states[state].rows.map((v) => rows[n][v])));
    }
    const of = (way) => way.reduce((p, [s, c]) => p * softmax(known.get(s), this.task.temperature[field])[c], 1);
    return Object.fromEntries(ways.map((way, n) => [this.task.names[field][n], round4(of(way))]));
  }

  /** how the value of a field is called where its probability is told. */
  nameOf(field, value) {
    const same = this.task.fields[field].findIndex((one) => JSON.stringify(one) === JSON.stringify(value));
    return this.task.names[field][same];
  }

  /** the answer that these decisions spell out. */
  async record(made, { confidence = false, minConfidence = 0 }) {
    const answer = {}, sure = {};
    for (const [field, values] of Object.entries(this.task.fields)) {
      const ways = this.task.ways[field] ?? [[]];
      const n = ways.findIndex((way) => way.every(([s, c]) => made.get(s)?.pick === c));
      answer[field] = values[n];
      sure[field] = ways[n].reduce((p, [s, c]) => p * softmax(made.get(s).scores, this.task.temperature[field])[c], 1);
    }
    if (confidence) {
      answer._confidence = {};
      for (const [field, p] of Object.entries(sure)) {
        answer._confidence[field] = confidence === 'full' ? await this.values(field, made) : round4(p);
      }
    }
    if (Math.min(...Object.values(sure)) < minConfidence) answer._defer = true;
    return answer;
  }

  /** texts -> records, in their order. options: confidence (true or 'full'), minConfidence. */
  async label(texts, options = {}) {
    const ids = texts.map((text) => this.read(text));
    const records = ids.map((row) => (row.length ? null : { error: 'empty text' }));
    const order = ids.flatMap((row, n) => (row.length ? [n] : []));
    order.sort((a, b) => ids[a].length - ids[b].length); // texts of like length are read together
    for (let at = 0; at < order.length; at += BATCH) {
      const batch = order.slice(at, at + BATCH);
      const made = await this.decide(batch.map((n) => ids[n].slice(0, this.task.max_text)));
      for (let i = 0; i < batch.length; i++) records[batch[i]] = await this.record(made[i], options);
    }
    return records;
  }
}

/** the program: lines in, JSON lines out. */
async function main(args) {
  const flags = { '--confidence': true, '--confidence=full': 'full' };
  const wrong = args.find((arg) => !(arg in flags));
  if (wrong || process.stdin.isTTY) {
    const what = wrong ? `cannot read ${wrong}` : 'nothing to label';
    throw new Error(`${what}; run: node student.js [--confidence[=full]] < texts.txt`);
  }
  const student = await Student.load();
  const label = async (lines) => {
    const records = await student.label(lines, { confidence: flags[args[0]] });
    process.stdout.write(records.map((record) => `${JSON.stringify(record)}\n`).join(''));
  };
  const decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  let rest = '';
  for await (const part of process.stdin) {
    const lines = (rest + decoder.decode(part, { stream: true })).split('\n');
    rest = lines.pop();
    await label(lines);
  }
  rest += decoder.decode();
  if (rest) await label([rest]);
}

if (globalThis.process?.argv?.[1]) { // Node; is it this file that was started?
  const [{ realpathSync }, { pathToFileURL }] = await Promise.all([import('node:fs'), import('node:url')]);
  if (import.meta.url === pathToFileURL(realpathSync(process.argv[1])).href) {
    process.stdout.on('error', () => process.exit()); // a reader that went away
    await main(process.argv.slice(2)).catch((error) => {
      console.error(error.message);
      process.exitCode = 1;
    });
  }
}
