/* Keeps the files of this folder for when there is no network: a service worker, registered by index.html.
   While there is one it is asked first, so that a new export is seen at once. */
const KEPT = 'student';
const FILES = ['./', 'index.html', 'student.js', 'student.onnx', 'task.json', 'tokenizer.json',
  'npm/tokenizers.min.mjs', 'npm/ort.wasm.bundle.min.mjs', 'npm/ort-wasm-simd-threaded.wasm.gz'];

const URLS = new Set(FILES.map((file) => new URL(file, self.registration.scope).href));

self.addEventListener('install', (event) => {
  event.waitUntil(caches.open(KEPT).then((cache) => cache.addAll(FILES)).then(() => self.skipWaiting()));
});
self.addEventListener('activate', (event) => event.waitUntil(self.clients.claim()));
self.addEventListener('fetch', (event) => {
  if (event.request.method !== 'GET' || !URLS.has(event.request.url.split(/[?#]/)[0])) return; // not ours
  event.respondWith((async () => {
    const cache = await caches.open(KEPT);
    try {
      const answer = await fetch(event.request);
      if (answer.status === 200) event.waitUntil(cache.put(event.request, answer.clone()).catch(() => {}));
      return answer;
    } catch (error) {
      const kept = await cache.match(event.request, { ignoreSearch: true });
      if (kept) return kept;
      throw error;
    }
  })());
});
