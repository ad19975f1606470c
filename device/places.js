/* The places of a text at which a copied value may stand: the twin of distil/places.py, which says what they are. The
   names are the same, in camelCase. Places are counted in code points, as Python counts characters. WordPiece tells at
   which characters a token stands, which @huggingface/tokenizers does not. */
import { findCandidates } from './candidates.js';

const ALONE = /[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u{20000}-\u{3ffff}]/u;
const WORD = /[\p{L}\p{N}\p{M}_\u200c\u200d]/u; // a letter or digit, and what is joined to one: an accent, a joiner

/** for each place of a text, a list of characters, whether a value may begin or end there, white space aside. */
export function findEdges(chars) {
  const isWord = chars.map((char) => WORD.test(char)), isAlone = chars.map((char) => ALONE.test(char));
  const inner = chars.slice(1).map((_, n) => !(isWord[n] && isWord[n + 1]) || isAlone[n] || isAlone[n + 1]);
  return chars.length ? [true, ...inner, true] : [true];
}

/** A text as a student reads it. offsets: [start, end] in characters of its tokens, [0, 0] for one that stands for no
    text; task: task.json, which says how numbers and dates are read. The text is clean: its white space is single
    blanks. A part is one of task.copied. */
export class Page {
  constructor(text, offsets, { locale, reference_date: referenceDate }) {
    const chars = Array.from(text), edges = findEdges(chars);
    Object.assign(this, { text, chars, locale, referenceDate, spansOf: new Map() });
    const trimmed = offsets.map(([start, end]) => {
      while (start < end && chars[start] === ' ') start++;
      while (start < end && chars[end - 1] === ' ') end--;
      return start < end ? [start, end] : [-1, -1];
    });
    this.starts = trimmed.map(([start]) => start);
    this.ends = trimmed.map(([, end]) => end);
    this.begins = this.starts.map((start) => start >= 0 && edges[start]);
    this.closes = this.ends.map((end) => end >= 0 && edges[end]);
  }

  /** the number of the token that begins or, if isEnd, ends at a character; else that in which it is; -1 if the student
      does not read it. */
  tokenOf(place, isEnd) {
    const at = place - Number(isEnd), isInside = (start, n) => start <= at && at < this.ends[n];
    return isEnd ? this.starts.findIndex(isInside) : this.starts.findLastIndex(isInside);
  }

  /** { first, last: tokens, start, end, value } of the candidates of a kind that the student reads. */
  spans(kind) {
    if (!this.spansOf.has(kind)) {
      const found = findCandidates(kind, this.text, this.locale, this.referenceDate).map((candidate) => ({
        first: this.tokenOf(candidate.start, false), last: this.tokenOf(candidate.end, true), ...candidate }));
      this.spansOf.set(kind, found.filter(({ first, last }) => first >= 0 && last >= 0));
    }
    return this.spansOf.get(kind);
  }

  /** the tokens with which a value may begin. taken: that earlier items of the same list begin with. */
  firsts({ kind }, taken = []) {
    const able = kind === 'text' ? indicesOf(this.begins) : sortUnique(this.spans(kind).map(({ first }) => first));
    const free = able.filter((token) => !taken.includes(token));
    return free.length ? free : able;
  }

  /** the tokens with which a value may end that begins with this one. */
  lasts({ kind }, first) {
    const able = kind === 'text' ? indicesOf(this.closes).filter((token) => token >= first)
      : sortUnique(this.spans(kind).filter((span) => span.first === first).map(({ last }) => last));
    return able.length ? able : [first];
  }

  /** { start, end, value } of the copied value that begins and ends with these tokens; its value is null where there is
      none. */
  span({ kind }, first, last) {
    if (kind === 'text') {
      const [start, end] = [this.starts[first], this.ends[last]];
      return { start, end, value: this.chars.slice(start, end).join('') };
    }
    const { start, end, value } = this.spans(kind).find((span) => span.first === first && span.last === last)
      ?? { start: 0, end: 0, value: null };
    return { start, end, value };
  }
}

const indicesOf = (flags) => flags.flatMap((flag, n) => (flag ? [n] : []));
const sortUnique = (numbers) => [...new Set(numbers)].sort((a, b) => a - b);

// ---------------------------------------------------------------------------
// tokens

const CHINESE = new RegExp('[\\u4e00-\\u9fff\\u3400-\\u4dbf\\u{20000}-\\u{2a6df}\\u{2a700}-\\u{2b81f}'
  + '\\u{2b920}-\\u{2ceaf}\\uf900-\\ufaff\\u{2f800}-\\u{2fa1f}]', 'u');
const ALONE_TOKEN = /[!-/:-@[-`{-~\p{P}]/u; // also $ and +

/** The tokenizer of a BERT, as Python's package tokenizers has it. The argument is a tokenizer.json; throws an Error if
    that is of another kind. Characters that are younger than 2015 may be cut in another way. */
export class WordPiece {
  constructor({ model, normalizer, pre_tokenizer: splitter, added_tokens: added = [] }) {
    if (model.type !== 'WordPiece' || normalizer?.type !== 'BertNormalizer' || splitter?.type !== 'BertPreTokenizer') {
      throw new Error('tokenizer.json is not of BERT\'s kind; this student answers in Python alone: run.py');
    }
    this.model = model;
    this.vocab = new Map(Object.entries(model.vocab));
    this.normalizer = normalizer;
    this.added = new Map(added.map(({ content, id }) => [content, id])); // such as [SEP]: found whole
    const names = [...this.added.keys()].sort((a, b) => b.length - a.length);
    this.ofAdded = names.length
      && new RegExp(names.map((name) => name.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&')).join('|'), 'gu');
  }

  /** a text -> { ids, offsets: [start, end] in characters of each }. */
  encode(text) {
    const ids = [], offsets = [];
    let at = 0, done = 0; // in code points; in code units
    const cut = (part) => {
      const chars = Array.from(part);
      for (const word of this.words(chars, at)) this.cutWord(word, ids, offsets);
      at += chars.length;
    };
    for (const found of this.ofAdded ? text.matchAll(this.ofAdded) : []) {
      cut(text.slice(done, found.index));
      const length = Array.from(found[0]).length;
      ids.push(this.added.get(found[0]));
      offsets.push([at, at + length]);
      at += length;
      done = found.index + found[0].length;
    }
    cut(text.slice(done));
    return { ids, offsets };
  }

  /** the words of characters that begin at a place: lists of [normalized character, place]. */
  words(chars, at) {
    const { clean_text: cleans, handle_chinese_chars: splits, lowercase } = this.normalizer;
    const strips = this.normalizer.strip_accents ?? lowercase, words = [];
    let word = [];
    const end = () => {
      if (word.length) words.push(word);
      word = [];
    };
    chars.forEach((char, n) => {
      if (cleans && /[\0\ufffd\p{Cc}\p{Cf}\p{Co}\p{Cs}]/u.test(char)) return;
      let written = strips ? char.normalize('NFD').replace(/\p{Mn}/gu, '') : char;
      if (lowercase) written = Array.from(written, (one) => one.toLowerCase()).join('');
      for (const one of written) {
        const isAlone = ALONE_TOKEN.test(one) || splits && CHINESE.test(char);
        if (isAlone || /\s/u.test(one)) end();
        if (/\s/u.test(one)) continue;
        word.push([one, at + n]);
        if (isAlone) end();
      }
    });
    end();
    return words;
  }

  /** appends the tokens of a word: the longest ones of the vocabulary, from its beginning on. */
  cutWord(word, ids, offsets) {
    const { continuing_subword_prefix: prefix, max_input_chars_per_word: most, unk_token: unknown } = this.model;
    const found = [];
    for (let start = 0; start < word.length && word.length <= most;) {
      let end = word.length, id;
      for (; end > start; end--) {
        const piece = word.slice(start, end).map(([char]) => char).join('');
        id = this.vocab.get(start ? prefix + piece : piece);
        if (id !== undefined) break;
      }
      if (id === undefined) break;
      found.push([id, start, end]);
      start = end;
    }
    const isWhole = found.length && found.at(-1)[2] === word.length;
    for (const [id, start, end] of isWhole ? found : [[this.vocab.get(unknown), 0, word.length]]) {
      ids.push(id);
      offsets.push([word[start][1], word[end - 1][1] + 1]);
    }
  }
}
