/* The numbers, dates and times that stand in a text: the twin of distil/candidates.py, which says what they are. The
   names are the same, in camelCase. Places are counted in code points, as Python counts characters.

     findCandidates('number', 'about $1,080.00', locale);  // [{ start: 7, end: 15, value: 1080 }]
     // locale: that of task.json */

const LETTERS = 'a-z_ß-ɏͰ-ԯḀ-ỿ'; // Latin, Greek, Cyrillic: their words end before a number, those of Chinese need not
const SAME = new Map([...'\xa0\u2009\u202f’−．，：／－'].map((char, n) => [char, "   '-.,:/-"[n]]));
// between a date and a time
const LINK = /^(?:[.,]? ?(?:(?:at|on|um|am|à|às|a las|alle|om|kl\.?|klo) )?|t)$/u;

const isDigit = (code) => code >= 0 && /\p{Nd}/u.test(String.fromCodePoint(code));

function foldCharacter(char) {
  if (char <= '\x7f') return char.toLowerCase();
  const code = char.codePointAt(0);
  if (isDigit(code)) { // the digits of a script stand in tens, one after the other
    let zero = code;
    while (isDigit(zero - 1)) zero--;
    return String((code - zero) % 10);
  }
  const lower = char.toLowerCase();
  return SAME.get(char) ?? ([...lower].length === 1 ? lower : char);
}

/** a text of as many code points: lower case; 0 to 9 for the digits of all scripts; one kind of blank, one of minus. */
export const fold = (text) => Array.from(text, foldCharacter).join('');

// ---------------------------------------------------------------------------
// regular expressions

/** a text as a regular expression. */
const escape = (text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&');

/** one of these characters. */
const oneOf = (chars) => `[${chars.replace(/[\\\]^-]/g, '\\$&')}]`;

/** one of these words, the longest that fits. Without words it never matches. */
const anyOf = (words) => [...words].sort((a, b) => [...b].length - [...a].length).map(escape).join('|') || '(?!)';

/** the regular expressions of a locale: { run, number, time: one, dates: a list }. */
function compilePatterns(locale) {
  const [decimal, group] = [locale.decimal, locale.group].map(oneOf);
  const joins = oneOf([...new Set(`.,:/-${locale.decimal}${locale.group}`)].filter((char) => char !== ' ').join(''));
  const blank = locale.group.includes(' ') ? '| \\d{3}(?!\\d)' : '';
  const run = `(?<glued>[${LETTERS}])?(?<sign>(?<![${LETTERS}\\d)+\\-])[+\\-])?`
    + `(?<digits>(?:(?<![${LETTERS}\\d.,])${decimal})?\\d+(?:${joins}\\d+${blank})*)`
    + `(?<unit>[${LETTERS}]+(?:\\d[${LETTERS}\\d]*)?)?`;
  const number = `^(?:(?<whole>\\d{1,3}(?:${group}\\d{2,3})*${group}\\d{3}|\\d*)(?:${decimal}(?<part>\\d+))?)$`;

  const before = `(?<![${LETTERS}\\d])(?<!\\d[\\-/.,:])`, after = '(?!\\d|[\\-/.,:]\\d)';
  const part = { y: '(?<y>\\d{4}|\\d\\d)', m: '(?<m>\\d\\d?)', d: '(?<d>\\d\\d?)' };
  const month = `(?<name>${anyOf(Object.keys(locale.months))})(?![${LETTERS}])`, nth = `${part.d}(?:st|nd|rd|th)?`;
  const year = `(?:(?:,? ?|[\\-/])(?:de )?(?<y>\\d{4})|(?:[\\-/]| ?')(?<yy>\\d\\d))?(?![${LETTERS}\\d]|[.,:]\\d)`;
  const [one, two, three] = [...locale.order].map((key) => part[key]);
  const [first, second] = [...(locale.day_first ? 'dm' : 'md')].map((key) => part[key]);
  const dates = [
    `${before}(?<y>\\d{4})(?<s>[\\-/]|\\. ?)${part.m}\\k<s>${part.d}${after}`,
    `${before}${one}(?<s>[\\-/]|\\. ?)${two}\\k<s>${three}${after}`,
    `${before}${first}/${second}${after}`,
    locale.dots ? `${before}${first}\\. ?${second}(?=\\.)${after}` : '(?!)',
    `(?<![${LETTERS}\\d])(?<!\\d[.,:])${part.d}(?:st|nd|rd|th|er|\\.|º)?[ \\-]?(?:(?:of|de) )?${month}${year}`,
    `${before}${month}[ \\-]?${nth}${year}`,
    locale.order === 'ymd' ? `${before}(?<y>\\d{4})\\.?[ \\-]?${month}[ \\-]?${nth}${after}` : '(?!)',
    `(?<!\\d)(?:(?<y>\\d{4})[年년] ?)?${part.m}[月월] ?${part.d}[日일]`,
    `(?<![${LETTERS}\\d])(?<word>${anyOf(Object.keys(locale.days))})(?![${LETTERS}\\d])`];

  const halves = new Set([...locale.am, ...locale.pm, 'uhr']);
  const isOfLetters = new RegExp(`^[${LETTERS}]`, 'u');
  const leading = anyOf([...halves].filter((word) => !isOfLetters.test(word))); // as in Chinese
  const time = `(?:(?<leading>${leading}) ?)?(?:(?<![${LETTERS}\\d])|(?<=\\dt))(?<!\\d[:.,/])(?<h>\\d\\d?)`
    + '(?:(?<join>[:.])(?<m>\\d\\d)(?::(?<s>\\d\\d)(?:\\.\\d{1,9})?(?:z|[+\\-]\\d\\d:?\\d\\d)?)?)?'
    + `(?: ?(?<half>${anyOf(halves)})(?![${LETTERS}])(?!(?<=uhr) \\d))?(?!\\d|[/.,:]\\d)`;
  const compile = (pattern) => new RegExp(pattern, 'gu');
  return { run: compile(run), number: new RegExp(number, 'u'), time: compile(time), dates: dates.map(compile) };
}

const compiled = new Map(); // { a locale as JSON: its patterns }

function patternsOf(locale) {
  const key = JSON.stringify(locale);
  if (!compiled.has(key)) compiled.set(key, compilePatterns(locale));
  return compiled.get(key);
}

// ---------------------------------------------------------------------------
// candidates

/** the candidates of a text, in its order, { start, end, value } each; none overlaps another, the longest reading of a
    place counts. kind: 'number', 'integer', 'date', 'time' or 'date-time'; locale: that of task.json; referenceDate: as
    '2026-05-03', the day on which the text was written, or null. */
export function findCandidates(kind, text, locale, referenceDate = null) {
  const folded = fold(text), patterns = patternsOf(locale);
  const today = referenceDate && toDate(...referenceDate.split('-').map(Number));
  let found;
  if (kind === 'number' || kind === 'integer') {
    found = findNumbers(folded, patterns).filter(({ value }) => kind === 'number' || Number.isInteger(value));
  } else {
    const dates = kind === 'time' ? [] : findDates(folded, patterns.dates, locale, today);
    const times = kind === 'date' ? [] : findTimes(folded, patterns.time, locale);
    found = { date: dates, time: times, 'date-time': joinDatesAndTimes(folded, dates, times) }[kind];
  }
  const codePoint = [0]; // of each place of a JavaScript string
  for (const char of folded) for (let n = char.length; n; n--) codePoint.push(codePoint.at(-1) + (n === 1));
  return found.map(({ start, end, value }) => ({ start: codePoint[start], end: codePoint[end], value }));
}

/** the numbers of a folded text. */
function findNumbers(text, patterns) {
  const numbers = [];
  for (const run of text.matchAll(patterns.run)) {
    const { glued, sign: ownSign = '', digits, unit = '' } = run.groups;
    if (glued || /\d/.test(unit) || ['k', 'm', 'mn', 'b', 'bn'].includes(unit)) continue;
    let start = run.index + ownSign.length, sign = ownSign;
    for (const part of splitRun(digits, patterns.number)) {
      const found = patterns.number.exec(part);
      if (found && part.replace(/\D/g, '').length <= 15) {
        const value = Number(`${sign}${found.groups.whole.replace(/\D/g, '')}.${found.groups.part ?? '0'}`);
        numbers.push({ start: start - sign.length, end: start + part.length, value: value + 0 }); // + 0: -0 is 0
      }
      start += part.length + 1;
      sign = '';
    }
  }
  return numbers;
}

/** the parts of joined digits that may be numbers: the whole, or the two around a sign, or those between blanks. */
function splitRun(digits, number) {
  if (number.test(digits)) return [digits];
  const parts = digits.split(/[-/:]/);
  if (parts.length === 2 && !/^\d\d?:\d\d$/.test(digits)) return parts;
  return digits.includes(' ') ? digits.split(' ') : [];
}

/** the dates of a folded text. today: a Date, or null. */
function findDates(text, patterns, locale, today) {
  const kept = [], candidates = [];
  for (const found of patterns.flatMap((pattern) => [...text.matchAll(pattern)])) {
    const { y, yy, m, d, name, word } = found.groups;
    let day = null;
    if (word !== undefined) {
      if (today) day = new Date(today.getTime() + locale.days[word] * 864e5);
    } else {
      day = readDate(y ?? yy, name === undefined ? Number(m) : locale.months[name], Number(d), today);
    }
    const [start, end] = [found.index, found.index + found[0].length];
    if (day) candidates.push({ start, end, value: day.toISOString().slice(0, 10) });
  }
  candidates.sort((a, b) => a.start - b.start || b.end - a.end);
  for (const found of candidates) {
    const last = kept.at(-1);
    if (!last || found.start >= last.end) kept.push(found);
    else if (found.end - found.start > last.end - last.start) kept[kept.length - 1] = found;
  }
  return kept;
}

/** a day as a Date, null if there is none. */
function toDate(year, month, day) {
  const date = new Date(0);
  date.setUTCFullYear(year, month - 1, day);
  const exists = year > 0 && year < 10000 && date.getUTCMonth() === month - 1 && date.getUTCDate() === day;
  return exists ? date : null;
}

/** a Date, or null. year: two or four digits, or undefined: then it is the one nearest to today. */
function readDate(year, month, day, today) {
  if (year) return toDate(Number(year) + (year.length === 4 ? 0 : 1900 + 100 * (year < '70')), month, day);
  if (!today) return null;
  const near = [-4, -3, -2, -1, 0, 1, 2, 3, 4].map((n) => toDate(today.getUTCFullYear() + n, month, day));
  const away = (date) => Math.abs(date - today);
  return near.reduce((best, date) => (date && (!best || away(date) < away(best)) ? date : best), null);
}

/** the times of a folded text. */
function findTimes(text, pattern, locale) {
  const times = [];
  for (const found of text.matchAll(pattern)) {
    const { h, m, s, join, half = found.groups.leading } = found.groups;
    let hour = Number(h);
    const [minute, second] = [Number(m ?? 0), Number(s ?? 0)];
    if (half && half !== 'uhr' && hour >= 1 && hour <= 12) hour = hour % 12 + 12 * locale.pm.includes(half);
    else if (half !== 'uhr' && join !== ':') continue; // 2, 2.30, 14 pm
    if (hour < 24 && minute < 60 && second < 60) {
      const value = [hour, minute, second].map((n) => String(n).padStart(2, '0')).join(':');
      times.push({ start: found.index, end: found.index + found[0].length, value });
    }
  }
  return times;
}

/** each date with the time beside it, before or after it. */
function joinDatesAndTimes(text, dates, times) {
  const joined = [], places = [...dates.map((found) => [found, 1]), ...times.map((found) => [found, 0])];
  const order = (a, b) => (a < b ? -1 : Number(a > b));
  places.sort(([a, isDate], [b, other]) => (
    a.start - b.start || a.end - b.end || order(a.value, b.value) || isDate - other));
  for (let n = 1; n < places.length; n++) {
    const [[first, firstIsDate], [second, isDate]] = places.slice(n - 1, n + 1);
    const isUsed = joined.length && joined.at(-1).end > first.start;
    if (firstIsDate !== isDate && !isUsed && first.end <= second.start
        && LINK.test(text.slice(first.end, second.start))) {
      const [day, time] = firstIsDate ? [first, second] : [second, first];
      joined.push({ start: first.start, end: second.end, value: `${day.value}T${time.value}` });
    }
  }
  return joined;
}
