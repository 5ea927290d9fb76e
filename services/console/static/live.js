// The feed: one connection for the page. `on(kind, handler)`; kinds: snapshot, batch, status, link.

const handlers = { snapshot: [], batch: [], status: [], link: [] };
export const on = (kind, handler) => handlers[kind].push(handler);
const tell = (kind, data) => { for (const handler of handlers[kind]) handler(data); };

/** Milliseconds of script spent on the feed, for the note under the map. */
export const cost = { batches: 0, total: 0 };

export function connect() {
  const source = new EventSource("/api/live");
  source.onopen = () => tell("link", true);
  source.onerror = () => tell("link", false);  // it connects again by itself, and begins with a snapshot
  for (const kind of ["snapshot", "batch", "status"]) {
    source.addEventListener(kind, event => {
      const began = performance.now(), data = JSON.parse(event.data);
      tell(kind, data);
      if (kind === "snapshot") tell("status", data.status);
      if (kind === "batch") { cost.batches++; cost.total += performance.now() - began; }
    });
  }
}
