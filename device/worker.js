/* A service worker, registered by index.html: it stores the files of this folder, so that the page works
   without a network. A file is taken from the network if possible, so a new export is seen at once. */
const CACHE = 'student';
const FILES = ['./', 'index.html', 'student.js', 'places.js', 'candidates.js',
  'student.onnx', 'task.json', 'tokenizer.json',
  'npm/tokenizers.min.mjs', 'npm/ort.wasm.bundle.min.mjs', 'npm/ort-wasm-simd-threaded.wasm.gz'];
const OPTIONAL = ['reader.onnx']; // not every student has it

const URLS = new Set([...FILES, ...OPTIONAL].map((file) => new URL(file, self.registration.scope).href));

self.addEventListener('install', (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => Promise.all([
    cache.addAll(FILES), ...OPTIONAL.map((file) => cache.add(file).catch(() => {}))])).then(() => self.skipWaiting()));
});
self.addEventListener('activate', (event) => event.waitUntil(self.clients.claim()));
self.addEventListener('fetch', (event) => {
  const known = URLS.has(event.request.url.split(/[?#]/)[0]);
  if (event.request.method !== 'GET' || !known) return;
  event.respondWith((async () => {
    const cache = await caches.open(CACHE);
    try {
      const response = await fetch(event.request);
      if (response.status === 200) {
        event.waitUntil(cache.put(event.request, response.clone()).catch(() => {}));
      }
      return response;
    } catch (error) {
      const stored = await cache.match(event.request, { ignoreSearch: true });
      if (stored) return stored;
      throw error;
    }
  })());
});
