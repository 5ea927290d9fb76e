// The space-time map: a row per worker, time to the right. An ES module without imports.
//
// Data model (tandem/spacetime/model.py): rows {row, id, role, model}; spans of a row (kind, begin, end, level), kinds
// prefill, mixed, decode, transfer; times in milliseconds of one clock. Live maps also get requests: segments
// (row, lane, kind, begin, request) that open and close.
//
// How it stays fast: the picture is a ring of pixel columns. A column is painted once, when its time has come or
// something about it is heard; a frame copies the ring to the screen, and a frame in which nothing has changed does
// nothing. What a column shows of each row is the share of its time that each kind took, stacked; rows of a few pixels
// blend the colours instead. Nothing is sampled away.

export const KINDS = ["prefill", "mixed", "decode", "transfer"];
const PREFILL = 0, MIXED = 1, DECODE = 2, TRANSFER = 3;
const SILENT = 3, GONE = 4, DRAINING = 2;
const AXIS = 24, QUEUE = 30, LANES_FROM = 30, STACK_FROM = 6;
const MAX_LANE_RECTS = 6000;
const LATE = 350;  // ms behind the newest report at which a live map ends: reports come every 100 ms

/** Spans in order of their end. Grows to `most`, then forgets its oldest quarter. */
class Spans {
  constructor(most) {
    this.most = most; this.n = 0; this.cap = 0;
    this.kind = new Uint8Array(0); this.begin = new Float64Array(0); this.end = new Float64Array(0);
    this.level = new Float32Array(0);
  }
  add(kind, begin, end, level) {
    const i = this.n - 1;
    if (i >= 0 && this.kind[i] === kind && begin - this.end[i] < 1 && end - this.begin[i] < 2000
        && Math.abs(level - this.level[i]) <= 0.2 * this.level[i]) {
      const before = this.end[i] - this.begin[i], added = end - begin;
      this.level[i] = (this.level[i] * before + level * added) / Math.max(1e-9, before + added);
      this.end[i] = end;
      return;
    }
    if (this.n === this.cap) this.#room();
    this.kind[this.n] = kind; this.begin[this.n] = begin; this.end[this.n] = end; this.level[this.n] = level;
    this.n++;
  }
  #room() {
    if (this.cap < this.most) {
      this.cap = Math.min(this.most, Math.max(128, 2 * this.cap));
      for (const name of ["kind", "begin", "end", "level"]) {
        const grown = new this[name].constructor(this.cap);
        grown.set(this[name]);
        this[name] = grown;
      }
    } else {
      const gone = this.cap >> 2;
      for (const name of ["kind", "begin", "end", "level"]) this[name].copyWithin(0, gone, this.n);
      this.n -= gone;
    }
  }
  /** Index of the first span that ends after t. */
  after(t) {
    let low = 0, high = this.n;
    while (low < high) { const mid = (low + high) >> 1; if (this.end[mid] > t) high = mid; else low = mid + 1; }
    return low;
  }
}

class Row {
  constructor(meta, most) {
    Object.assign(this, meta);
    this.engine = new Spans(most); this.transfers = new Spans(Math.min(most, 1024));
    this.segments = []; this.open = new Map();  // lane -> segment
    this.states = [];  // [time, state], when it changed
    this.load = null;
  }
  stateAt(t) {
    for (let i = this.states.length - 1; i >= 0; i--) if (this.states[i][0] <= t) return this.states[i][1];
    return 0;
  }
  requestsAt(t, slack) {
    const found = [];
    for (const s of this.segments) if (s.begin - slack <= t && t <= s.end + slack) found.push(s);
    for (const s of this.open.values()) if (s.begin - slack <= t) found.push(s);
    return found;
  }
}

const order = (a, b) => (a.role === b.role ? 0 : a.role === "prefill" ? -1 : b.role === "prefill" ? 1 : 0)
  || a.id.localeCompare(b.id, undefined, { numeric: true });

export class SpaceTimeMap {
  /** `live`: time goes on, and the view follows. `onPick(requests, point)`, `onHover(info | null)`, `onView()`. */
  constructor(canvas, { live = false, spanMs = 60000, onPick, onHover, onView } = {}) {
    this.canvas = canvas; this.g = canvas.getContext("2d", { alpha: false });
    this.live = live; this.following = live; this.span = spanMs; this.end = spanMs;
    this.onPick = onPick; this.onHover = onHover; this.onView = onView;
    this.rows = new Map(); this.ordered = []; this.queue = []; this.bounds = [0, spanMs];
    this.levelMax = 1; this.rowCss = 0; this.wantedRow = 0; this.top = 0; this.cursor = null; this.picked = "";
    this.ring = null; this.drawnAs = "";
    this.paintedTo = null; this.dirtyFrom = Infinity; this.clock = null; this.lanesDrawn = [0, 0];
    this.timing = { frames: 0, total: 0, worst: 0, recent: [] };
    this.#listen(); this.theme(); this.resize();
  }

  // -- data ------------------------------------------------------------------------------------------------------

  clear() {
    this.rows.clear(); this.ordered = []; this.queue = []; this.levelMax = 1; this.#allDirty();
  }
  setRows(metas) {
    for (const meta of metas) {
      const known = this.rows.get(meta.row);
      if (known) Object.assign(known, meta);
      else this.rows.set(meta.row, new Row(meta, Math.max(1200, Math.min(16000, Math.floor(800000 / Math.max(1, this.rows.size + metas.length))))));
    }
    if (metas.length) { this.ordered = [...this.rows.values()].sort(order); this.resize(); }
  }
  /** Flat: row, kind, begin, end, level, row, ... */
  addSpans(flat) {
    for (let i = 0; i + 4 < flat.length; i += 5) {
      const row = this.rows.get(flat[i]);
      if (!row) continue;
      const kind = flat[i + 1], begin = flat[i + 2], end = flat[i + 3], level = flat[i + 4];
      (kind === TRANSFER ? row.transfers : row.engine).add(kind, begin, end, level);
      if (begin < this.dirtyFrom) this.dirtyFrom = begin;
      if (level > this.levelMax) { this.levelMax = 2 ** Math.ceil(Math.log2(level)); this.#allDirty(); }
    }
  }
  open([index, lane, kind, begin, request]) {
    const row = this.rows.get(index);
    if (!row) return;
    row.open.set(lane, { row: index, lane, kind, begin, end: Infinity, request, outcome: 0 });
  }
  close([index, lane, end, outcome]) {
    const row = this.rows.get(index), segment = row?.open.get(lane);
    if (!segment) return;
    row.open.delete(lane);
    segment.end = end; segment.outcome = outcome;
    row.segments.push(segment);
    if (row.segments.length > 600) row.segments.splice(0, 200);
  }
  /** [row, state, running, waiting, pending tokens, KV share, handoffs] */
  setLoad(load, at) {
    const row = this.rows.get(load[0]);
    if (!row) return;
    row.load = load;
    const last = row.states[row.states.length - 1];
    if (!last || last[1] !== load[1]) {
      row.states.push([at, load[1]]);
      if (row.states.length > 400) row.states.splice(0, 100);
    }
    if (load[1] === GONE) {
      row.goneAt = at;
    }
  }
  setQueue(at, requests) {
    this.queue.push([at, requests]);
    if (this.queue.length > 1200) this.queue.splice(0, 300);
  }
  /** The feed's clock: its `now`, heard at this moment. */
  setNow(now) {
    const offset = now - performance.now();
    // The soonest of the recent messages is nearest to the truth; drift is let in slowly.
    this.clock = this.clock === null ? offset : Math.max(offset, this.clock - 0.5);
  }
  now() { return this.clock === null ? this.bounds[1] : performance.now() + this.clock; }
  forgetGone(before) {
    let gone = false;
    for (const [index, row] of this.rows) if (row.goneAt && row.goneAt < before) { this.rows.delete(index); gone = true; }
    if (gone) { this.ordered = [...this.rows.values()].sort(order); this.resize(); }
  }

  // -- view ------------------------------------------------------------------------------------------------------

  theme() {
    const style = getComputedStyle(this.canvas), get = name => style.getPropertyValue(name).trim();
    const rgb = name => { const c = get(name); const n = parseInt(c.slice(1), 16); return [n >> 16 & 255, n >> 8 & 255, n & 255]; };
    this.colour = KINDS.map(kind => rgb(`--${kind}`));
    this.css = KINDS.map(kind => get(`--${kind}`));
    this.idle = rgb("--idle"); this.between = rgb("--ground"); this.starved = rgb("--starved"); this.off = rgb("--off"); this.offLine = rgb("--off-line");
    this.fg = get("--fg"); this.dim = get("--dim"); this.line = get("--line"); this.ground = get("--ground");
    this.fail = get("--fail"); this.accent = get("--accent");
    this.hatch = this.#hatchPattern();
    this.#allDirty();
  }
  #hatchPattern() {
    const tile = document.createElement("canvas"); tile.width = tile.height = 6;
    const g = tile.getContext("2d");
    g.fillStyle = this.css[PREFILL]; g.fillRect(0, 0, 6, 6);
    g.strokeStyle = `rgb(${mix(this.colour[PREFILL], this.idle, .45)})`; g.lineWidth = 1.5;
    g.beginPath(); for (const d of [-6, 0, 6]) { g.moveTo(d, 6); g.lineTo(d + 6, 0); } g.stroke();
    return this.g.createPattern(tile, "repeat");
  }
  resize() {
    const host = this.canvas.parentElement, ratio = Math.min(2, devicePixelRatio || 1);
    const width = Math.max(240, host.clientWidth), rows = Math.max(1, this.ordered.length);
    const room = Math.max(160, Math.min(innerHeight * .64, 760));
    this.ratio = ratio; this.width = width;
    this.gutter = width < 640 ? 78 : 148;
    this.head = this.live ? QUEUE : 4;
    const fit = room / rows, least = 2 / ratio;
    // Whole pixels: what is painted is what is shown.
    this.rowPx = Math.max(1, Math.floor((this.wantedRow || Math.max(least, Math.min(52, fit))) * ratio));
    this.rowCss = this.rowPx / ratio;
    const most = this.wantedRow ? room : Math.max(room, Math.min(1100, rows * least));
    this.viewH = Math.min(rows * this.rowCss, most);
    this.height = Math.ceil(this.head + this.viewH + AXIS);
    this.canvas.style.height = this.height + "px";
    const w = Math.round(width * ratio), h = Math.round(this.height * ratio);
    if (this.canvas.width !== w || this.canvas.height !== h) { this.canvas.width = w; this.canvas.height = h; }
    this.cols = Math.max(16, Math.round((width - this.gutter) * ratio));
    this.scrollTo(this.top);
    this.#allDirty();
  }
  scrollTo(top) {
    const most = Math.max(0, this.ordered.length * this.rowCss - this.viewH);
    const next = Math.round(Math.max(0, Math.min(most, top)) * this.ratio) / this.ratio;
    if (next !== this.top) { this.top = next; this.#allDirty(); }
  }
  setRowHeight(css) { this.wantedRow = css ? Math.max(3, Math.min(120, css)) : 0; this.resize(); this.onView?.(); }
  setSpan(span, around = null) {
    const longest = this.live ? 600000 : Math.max(1, this.bounds[1] - this.bounds[0]);
    const next = Math.max(this.live ? 500 : 1, Math.min(longest, span));
    const at = around ?? this.end;
    if (!this.following) this.end = at + (this.end - at) * next / this.span;
    this.span = next; this.#keepIn(); this.#allDirty(); this.onView?.();
  }
  follow(on) {
    this.following = on && this.live;
    if (on && !this.live) { this.span = this.bounds[1] - this.bounds[0]; this.end = this.bounds[1]; }
    this.#allDirty(); this.onView?.();
  }
  pan(ms) { this.#endNow(); this.following = false; this.end += ms; this.#keepIn(); this.#allDirty(); this.onView?.(); }
  #endNow() { if (this.following) this.end = this.now() - LATE; }
  #keepIn() {
    const last = this.live ? this.now() - LATE : this.bounds[1];
    if (this.end > last) this.end = last;
    if (!this.live && this.end - this.span < this.bounds[0]) this.end = this.bounds[0] + this.span;
  }
  setBounds(begin, end) { this.bounds = [begin, end]; this.span = end - begin; this.end = end; this.#allDirty(); }
  #allDirty() { this.dirtyFrom = -Infinity; }
  get msPerColumn() { return this.span / this.cols; }

  // -- a frame ---------------------------------------------------------------------------------------------------

  /** Returns the milliseconds of script that it took. */
  frame() {
    const began = performance.now();
    this.#endNow();
    if (!this.ordered.length) this.#composeEmpty();
    else if (this.#hasNews()) { this.#paintColumns(); this.#compose(); }
    const took = performance.now() - began, t = this.timing;
    t.frames++; t.total += took; t.worst = Math.max(t.worst, took);
    t.recent.push(took); if (t.recent.length > 240) t.recent.shift();
    return took;
  }

  /** Whether the picture would differ from the one that is there. */
  #hasNews() {
    const c = this.cursor, last = this.queue[this.queue.length - 1];
    const as = `${Math.floor(this.end / this.msPerColumn)} ${this.top} ${c?.index} ${c?.t} ${this.picked} ${last?.[0]} ${last?.[1]}`;
    if (as === this.drawnAs && this.dirtyFrom === Infinity) return false;
    this.drawnAs = as;
    return true;
  }

  get #visible() {
    const first = Math.floor(this.top / this.rowCss);
    return [first, Math.min(this.ordered.length, Math.ceil((this.top + this.viewH) / this.rowCss))];
  }

  #paintColumns() {
    const ms = this.msPerColumn, last = Math.floor(this.end / ms), [first, until] = this.#visible;
    const h = (until - first) * this.rowPx;
    if (this.ring?.width !== this.cols || this.ring.height !== h) {
      this.ring = new ImageData(this.cols, h); this.pixels = new Uint32Array(this.ring.data.buffer); this.dirtyFrom = -Infinity;
    }
    const oldest = last - this.cols + 1;
    let from = Math.min(this.paintedTo === null ? -Infinity : this.paintedTo + 1, Math.floor(this.dirtyFrom / ms));
    from = Math.max(oldest, from);
    this.dirtyFrom = Infinity;
    // What goes on is drawn as going on, up to the end: those columns change with every frame.
    if (from <= last) this.#paint(from, last, first, until, ms);
    this.paintedTo = last;
  }

  #paint(from, to, first, until, ms) {
    const n = to - from + 1, shares = new Float32Array(n * 5), places = new Int32Array(n);
    const queued = this.#queuedColumns(from, n, ms);
    // The ring: column c is at c mod its width.
    for (let c = 0; c < n; c++) places[c] = this.#place(from + c);
    for (let i = first; i < until; i++) {
      const row = this.ordered[i];
      shares.fill(0);
      this.#accumulate(row.engine, shares, from, n, ms, true);
      this.#accumulate(row.transfers, shares, from, n, ms, false);
      this.#writeRow(row, (i - first) * this.rowPx, places, shares, queued, from, ms);
    }
  }
  #place(column) { return ((column % this.cols) + this.cols) % this.cols; }

  /** Of each column: how much of it each kind took, and (fifth) decoding sequences times that share. */
  #accumulate(spans, shares, from, n, ms, ordered) {
    const t0 = from * ms, t1 = (from + n) * ms;
    for (let i = spans.after(t0); i < spans.n; i++) {
      const begin = spans.begin[i], end = spans.end[i];
      if (begin >= t1) { if (ordered) break; else continue; }
      const a = Math.max(0, (begin - t0) / ms), b = Math.min(n, (end - t0) / ms), kind = spans.kind[i];
      const level = spans.level[i];
      for (let c = Math.floor(a); c < b; c++) {
        const share = Math.min(b, c + 1) - Math.max(a, c);
        if (share <= 0) continue;
        shares[c * 5 + kind] += share;
        if (kind === DECODE) shares[c * 5 + 4] += share * level;
      }
    }
  }

  #queuedColumns(from, n, ms) {
    const flags = new Uint8Array(n);
    let q = this.queue.length - 1;
    for (let c = n - 1; c >= 0 && q >= 0; c--) {
      const t = (from + c) * ms;
      while (q >= 0 && this.queue[q][0] > t) q--;
      if (q >= 0 && this.queue[q][1] > 0) flags[c] = 1;
    }
    return flags;
  }

  #writeRow(row, y0, places, shares, queued, from, ms) {
    const n = places.length, width = this.cols, pixels = this.pixels;
    const rowPx = this.rowPx, gap = rowPx >= 4 ? Math.max(1, Math.round(rowPx * .06)) : 0;
    const full = rowPx - gap, lanes = this.rowCss >= LANES_FROM && row.lanes !== false && this.live;
    const height = lanes ? Math.round(full * .46) : full;
    const strip = !lanes && full >= 12 ? Math.max(2, Math.round(full * .16)) : 0;
    const ground = pack(this.between);
    for (let c = 0; c < n; c++) {
      const place = places[c], t = (from + c) * ms, state = row.states.length ? row.stateAt(t) : 0;
      const k = c * 5, p = shares[k], m = shares[k + 1], d = shares[k + 2], x = Math.min(1, shares[k + 3]);
      const off = state === SILENT || state === GONE;
      const back = off ? this.off : queued[c] && state !== DRAINING ? this.starved : this.idle;
      const depth = d > 0 ? .38 + .62 * Math.sqrt(Math.min(1, shares[k + 4] / d / this.levelMax)) : 0;
      const decode = d > 0 ? mix(this.idle, this.colour[DECODE], depth) : null;
      if (full < STACK_FROM) {
        let colour = back;
        const sum = Math.max(1, p + m + d);
        if (p) colour = mix(colour, this.colour[PREFILL], p / sum);
        if (m) colour = mix(colour, this.colour[MIXED], m / sum);
        if (decode) colour = mix(colour, decode, d / sum);
        if (x) colour = mix(colour, this.colour[TRANSFER], x * (1 - Math.min(1, p + m + d)) * .9);
        const packed = pack(colour);
        for (let y = 0; y < full; y++) pixels[(y0 + y) * width + place] = packed;
        for (let y = full; y < rowPx; y++) pixels[(y0 + y) * width + place] = ground;
        continue;
      }
      const area = height - strip, sum = Math.max(1, p + m + d);
      const dTop = area - Math.round(d / sum * area), mTop = dTop - Math.round(m / sum * area);
      const pTop = Math.max(0, mTop - Math.round(p / sum * area));
      const backPacked = pack(back), decodePacked = decode ? pack(decode) : 0, column = from + c;
      for (let y = 0; y < rowPx; y++) {
        let colour = ground;
        if (y < area) {
          if (y >= dTop) colour = decodePacked;
          else if (y >= mTop) colour = ((column & 3) === 0 && (y & 3) === 0) ? this.#light[MIXED] : this.#packed[MIXED];
          else if (y >= pTop) colour = ((column + y) % 6 + 6) % 6 < 2 ? this.#light[PREFILL] : this.#packed[PREFILL];
          else colour = off && ((column - y) % 8 + 8) % 8 < 1 ? pack(this.offLine) : backPacked;
        } else if (y < height) {
          colour = x > 0 ? pack(mix(back, this.colour[TRANSFER], .25 + .75 * x)) : backPacked;
        } else if (y < full) colour = backPacked;
        pixels[(y0 + y) * width + place] = colour;
      }
    }
  }
  get #packed() { return this._packed?.[0] === this.colour ? this._packed[1] : (this._packed = [this.colour, this.colour.map(pack)])[1]; }
  get #light() {
    return this._light?.[0] === this.colour ? this._light[1]
      : (this._light = [this.colour, this.colour.map(c => pack(mix(c, this.idle, .45)))])[1];
  }

  #compose() {
    const g = this.g, r = this.ratio, w = this.canvas.width, h = this.canvas.height;
    const left = Math.round(this.gutter * r), head = Math.round(this.head * r);
    const [first, until] = this.#visible, shift = Math.round((first * this.rowCss - this.top) * r);
    g.setTransform(1, 0, 0, 1, 0, 0);
    g.fillStyle = this.ground; g.fillRect(0, 0, w, h);
    const split = this.#place(Math.floor(this.end / this.msPerColumn) + 1), y = -shift;
    const tall = Math.min(this.ring.height - y, Math.round(this.viewH * r));
    g.putImageData(this.ring, left + this.cols - split, head + shift, 0, y, split, tall);
    g.putImageData(this.ring, left - split, head + shift, split, y, this.cols - split, tall);
    g.setTransform(r, 0, 0, r, 0, 0);
    g.font = "12px system-ui, sans-serif"; g.textBaseline = "middle";
    this.#lanes(first, until);
    if (this.live) this.#drawQueue();
    this.#axis();
    this.#labels(first, until);
    this.#pointer();
  }
  #composeEmpty() {
    const g = this.g; g.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    g.fillStyle = this.ground; g.fillRect(0, 0, this.width, this.height);
    g.fillStyle = this.dim; g.font = "14px system-ui, sans-serif"; g.textBaseline = "middle";
    g.fillText("No worker has been heard yet.", 16, this.height / 2);
  }
  x(t) { return this.gutter + (t - (this.end - this.span)) / this.span * (this.width - this.gutter); }
  t(x) { return this.end - this.span + (x - this.gutter) / (this.width - this.gutter) * this.span; }
  y(index) { return this.head + index * this.rowCss - this.top; }

  /** Where rows are tall: each request in a lane of its own. */
  #lanes(first, until) {
    this.lanesDrawn = [0, 0];
    if (this.rowCss < LANES_FROM || !this.live) return;
    const g = this.g, begin = this.end - this.span;
    g.save(); g.beginPath(); g.rect(this.gutter, this.head, this.width - this.gutter, this.viewH); g.clip();
    for (let i = first; i < until; i++) {
      const row = this.ordered[i];
      let lanes = 1;
      const shown = [];
      for (const s of row.segments) if (s.end > begin && s.begin < this.end) { shown.push(s); if (s.lane >= lanes) lanes = s.lane + 1; }
      for (const s of row.open.values()) if (s.begin < this.end) { shown.push(s); if (s.lane >= lanes) lanes = s.lane + 1; }
      const top = this.y(i) + this.rowCss * .5, room = this.rowCss * .42;
      const fits = Math.max(1, Math.min(lanes, Math.floor(room / 2.5))), each = Math.min(8, room / fits);
      row.lanesShown = fits; row.laneTop = top; row.laneEach = each;
      for (const s of shown) {
        this.lanesDrawn[1]++;
        if (s.lane >= fits || this.lanesDrawn[0] >= MAX_LANE_RECTS) continue;
        this.lanesDrawn[0]++;
        const a = Math.max(this.gutter - 2, this.x(s.begin)), b = this.x(Math.min(s.end, this.end));
        const y = top + s.lane * each, w = Math.max(1, b - a), tall = Math.max(1.5, each - 1);
        g.globalAlpha = this.picked && this.picked !== s.request ? .35 : 1;
        g.fillStyle = s.kind === PREFILL ? this.hatch : this.css[s.kind];
        g.fillRect(a, y, w, tall);
        if (s.outcome === 1 || s.outcome === 2) {
          g.globalAlpha = 1; g.fillStyle = this.fail;
          g.fillRect(b - 2, y - 1, 3, tall + 2);
        }
      }
      g.globalAlpha = 1;
    }
    g.restore();
    if (this.picked) this.#path(first, until);
  }
  /** The way of one request over the rows: a line from each of its parts to the next. */
  #path(first, until) {
    const parts = [];
    for (let i = first; i < until; i++) {
      const row = this.ordered[i];
      for (const s of [...row.segments, ...row.open.values()])
        if (s.request === this.picked && s.end > this.end - this.span) parts.push([s, i, row]);
    }
    parts.sort((a, b) => a[0].begin - b[0].begin);
    const g = this.g; g.strokeStyle = this.fg; g.lineWidth = 1.5;
    let before = null;
    for (const [s, , row] of parts) {
      const lane = Math.min(s.lane, (row.lanesShown || 1) - 1), y = row.laneTop + lane * row.laneEach;
      const a = Math.max(this.gutter, this.x(s.begin)), b = this.x(Math.min(s.end, this.end));
      g.strokeRect(a - .5, y - 1, Math.max(2, b - a + 1), row.laneEach + 1);
      if (before && before.row !== row) {
        const bend = Math.max(8, (a - before.x) / 2);
        g.beginPath(); g.moveTo(before.x, before.y);
        g.bezierCurveTo(before.x + bend, before.y, a - bend, y + row.laneEach / 2, a, y + row.laneEach / 2);
        g.stroke();
      }
      before = { x: b, y: y + row.laneEach / 2, row };
    }
  }

  #drawQueue() {
    const g = this.g, base = this.head - 3, room = QUEUE - 8;
    g.fillStyle = this.dim;
    g.fillText(this.gutter > 100 ? "waiting in the router" : "waiting", 8, this.head / 2);
    if (this.queue.length < 2) return;
    const begin = this.end - this.span;
    let most = 4, i = this.queue.length - 1;
    while (i > 0 && this.queue[i][0] > begin) { most = Math.max(most, this.queue[i][1]); i--; }
    g.save(); g.beginPath(); g.rect(this.gutter, 0, this.width - this.gutter, this.head); g.clip();
    g.beginPath(); g.moveTo(this.x(this.queue[i][0]), base);
    let y = base;
    for (; i < this.queue.length; i++) {
      const [t, n] = this.queue[i];
      g.lineTo(this.x(t), y); y = base - n / most * room; g.lineTo(this.x(t), y);
    }
    g.lineTo(this.width, y); g.lineTo(this.width, base); g.closePath();
    g.fillStyle = this.line; g.fill();
    g.strokeStyle = this.dim; g.lineWidth = 1; g.stroke();
    g.restore();
    const now = this.queue[this.queue.length - 1][1];
    g.fillStyle = this.fg; g.textAlign = "right"; g.fillText(String(now), this.width - 6, 10); g.textAlign = "left";
  }

  #axis() {
    const g = this.g, bottom = this.head + this.viewH, raw = this.span / Math.max(2, (this.width - this.gutter) / 110);
    const power = 10 ** Math.floor(Math.log10(raw)), nice = [1, 2, 5, 10].map(k => k * power).find(k => k >= raw);
    const step = this.live && raw > 4000 ? [5000, 10000, 15000, 30000, 60000, 120000].find(k => k >= raw) ?? nice : nice;
    const edge = this.live && this.following ? this.end : this.live ? this.now() - LATE : 0;
    g.strokeStyle = this.line; g.fillStyle = this.dim; g.lineWidth = 1;
    const from = this.live ? Math.ceil((edge - this.end) / step) : Math.ceil((this.end - this.span) / step);
    for (let k = from; ; k++) {
      const t = this.live ? edge - k * step : k * step;
      if (this.live ? t < this.end - this.span : t > this.end) break;
      const x = Math.round(this.x(t)) + .5;
      g.globalAlpha = .6; g.beginPath(); g.moveTo(x, this.head); g.lineTo(x, bottom + 5); g.stroke(); g.globalAlpha = 1;
      const text = this.live ? (k === 0 ? "now" : "−" + seconds(k * step)) : seconds(t);
      const w = g.measureText(text).width;
      if (this.live ? x - w / 2 > this.gutter : x + w < this.width) g.fillText(text, Math.min(this.width - w - 2, x - (this.live ? w / 2 : -4)), bottom + AXIS / 2 + 2);
    }
    g.strokeStyle = this.line; g.beginPath(); g.moveTo(this.gutter, bottom + .5); g.lineTo(this.width, bottom + .5); g.stroke();
  }

  #labels(first, until) {
    const g = this.g, every = Math.max(1, Math.ceil(13 / this.rowCss));
    g.save(); g.beginPath(); g.rect(0, this.head, this.gutter, this.viewH); g.clip();
    g.fillStyle = this.ground; g.fillRect(0, this.head, this.gutter - 1, this.viewH);
    for (let i = first; i < until; i++) {
      const row = this.ordered[i], top = this.y(i), middle = top + this.rowCss / 2, roles = i > 0 && this.ordered[i - 1].role !== row.role;
      if (roles) { g.fillStyle = this.dim; g.fillRect(0, Math.round(top), this.gutter, 1); }
      if (this.cursor?.index === i) { g.fillStyle = this.line; g.fillRect(0, top, this.gutter, this.rowCss); }
      // The role as a shape: a triangle computes prompts, a disc decodes.
      if (this.rowCss >= 5 || i % every === 0) shape(g, row.role, 9, middle, Math.min(4.5, this.rowCss * .45), this.css[row.role === "prefill" ? PREFILL : DECODE]);
      if (i % every !== 0) continue;
      g.fillStyle = row.goneAt || row.load?.[1] >= DRAINING ? this.dim : this.fg;
      const two = this.rowCss >= 34 && row.load, small = this.gutter < 100;
      g.fillText(fitted(g, row.id, this.gutter - 26), 20, two ? middle - 8 : middle);
      if (two) { g.fillStyle = this.dim; g.fillText(fitted(g, loadWords(row, small), this.gutter - 26), 20, middle + 8); }
      if (this.rowCss >= 12 && row.load && row.load[5] > 0) {
        g.fillStyle = this.line; g.fillRect(this.gutter - 7, top + 2, 4, this.rowCss - 5);
        const kv = (this.rowCss - 5) * row.load[5];
        g.fillStyle = row.load[5] > .9 ? this.fail : this.dim; g.fillRect(this.gutter - 7, top + this.rowCss - 3 - kv, 4, kv);
      }
    }
    g.restore();
    g.strokeStyle = this.line; g.beginPath(); g.moveTo(this.gutter - .5, 0); g.lineTo(this.gutter - .5, this.head + this.viewH); g.stroke();
  }

  #pointer() {
    const c = this.cursor;
    if (!c) return;
    const g = this.g, x = Math.round(this.x(c.t)) + .5;
    if (x < this.gutter || x > this.width) return;
    g.strokeStyle = this.fg; g.globalAlpha = .55; g.lineWidth = 1;
    g.beginPath(); g.moveTo(x, this.head); g.lineTo(x, this.head + this.viewH); g.stroke();
    if (this.rowCss >= 3) g.strokeRect(this.gutter + .5, Math.round(this.y(c.index)) + .5, this.width - this.gutter - 1, Math.max(2, this.rowCss - 1));
    g.globalAlpha = 1;
  }

  // -- pointing --------------------------------------------------------------------------------------------------

  /** What the row did around that moment: shares of the column (at least), requests, and why it was idle. */
  describe(index, t, lane = null) {
    const row = this.ordered[index];
    if (!row) return null;
    const ms = Math.max(this.msPerColumn, 1), column = Math.floor(t / ms), shares = new Float32Array(5);
    this.#accumulate(row.engine, shares, column, 1, ms, true);
    this.#accumulate(row.transfers, shares, column, 1, ms, false);
    const busy = Math.min(1, shares[0] + shares[1] + shares[2]);
    let requests = row.requestsAt(t, ms / 2);
    if (lane !== null && requests.some(s => s.lane === lane)) requests = requests.filter(s => s.lane === lane);
    const queued = this.#queuedColumns(column, 1, ms)[0] > 0, state = row.stateAt(t);
    return { row, index, t, ms, shares: [...shares.slice(0, 4)], busy, requests, queued, state,
      level: shares[2] ? shares[4] / shares[2] : 0, ago: this.live ? this.now() - t : null };
  }
  at(offsetX, offsetY) {
    const index = Math.floor((offsetY - this.head + this.top) / this.rowCss);
    if (offsetX < this.gutter || offsetY < this.head || offsetY >= this.head + this.viewH || !this.ordered[index]) return null;
    const row = this.ordered[index];
    let lane = null;
    if (row.laneTop && this.rowCss >= LANES_FROM && offsetY >= row.laneTop) lane = Math.floor((offsetY - row.laneTop) / row.laneEach);
    return { index, t: this.t(offsetX), lane };
  }
  point(cursor, where) {
    this.cursor = cursor;
    const info = cursor && this.describe(cursor.index, cursor.t, cursor.lane);
    this.picked = info && info.requests.length === 1 ? info.requests[0].request : "";
    this.onHover?.(info, where);
  }
  #listen() {
    const c = this.canvas;
    let grip = null, moved = false;
    c.addEventListener("pointerdown", e => { grip = { x: e.clientX, y: e.clientY, end: null, top: this.top }; moved = false; c.setPointerCapture(e.pointerId); });
    c.addEventListener("pointermove", e => {
      const box = c.getBoundingClientRect();
      if (grip && Math.abs(e.clientX - grip.x) + Math.abs(e.clientY - grip.y) > 4) {
        if (!moved) { moved = true; this.#endNow(); grip.end = this.end; }
        const by = (grip.x - e.clientX) / (this.width - this.gutter) * this.span;
        if (Math.abs(e.clientX - grip.x) > 4) { this.following = false; this.end = grip.end + by; this.#keepIn(); this.#allDirty(); this.onView?.(); }
        this.scrollTo(grip.top + grip.y - e.clientY);
        return;
      }
      this.point(this.at(e.clientX - box.left, e.clientY - box.top), { x: e.clientX, y: e.clientY });
    });
    c.addEventListener("pointerup", e => {
      if (grip && !moved && this.cursor) {
        const info = this.describe(this.cursor.index, this.cursor.t, this.cursor.lane);
        if (info?.requests.length) this.onPick?.(info, { x: e.clientX, y: e.clientY });
      }
      grip = null;
    });
    c.addEventListener("pointercancel", () => { grip = null; });
    c.addEventListener("pointerleave", () => { if (!grip) this.point(null); });
    c.addEventListener("dblclick", () => this.follow(true));
    c.addEventListener("wheel", e => {
      const box = c.getBoundingClientRect();
      if (e.ctrlKey || e.metaKey) { e.preventDefault(); this.setSpan(this.span * Math.exp(e.deltaY / 300), this.t(e.clientX - box.left)); }
      else if (e.shiftKey || Math.abs(e.deltaX) > Math.abs(e.deltaY)) { e.preventDefault(); this.pan((e.deltaX || e.deltaY) / (this.width - this.gutter) * this.span); }
      else if (this.ordered.length * this.rowCss > this.viewH + 1) {
        const before = this.top; this.scrollTo(this.top + e.deltaY);
        if (this.top !== before) e.preventDefault();
      }
    }, { passive: false });
    c.addEventListener("keydown", e => this.#key(e));
    c.addEventListener("blur", () => this.point(null));
  }
  #key(e) {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const at = this.cursor ?? { index: 0, t: this.end - this.span / 2, lane: null }, step = this.span / 60;
    const move = (index, t) => {
      index = Math.max(0, Math.min(this.ordered.length - 1, index));
      if (this.y(index) < this.head) this.scrollTo(index * this.rowCss);
      if (this.y(index + 1) > this.head + this.viewH) this.scrollTo((index + 1) * this.rowCss - this.viewH);
      const box = this.canvas.getBoundingClientRect();
      this.#endNow();
      t = Math.max(this.end - this.span, Math.min(this.end, t));
      this.point({ index, t, lane: null }, { x: box.left + this.x(t), y: box.top + this.y(index) + this.rowCss });
    };
    const keys = {
      ArrowLeft: () => e.shiftKey ? this.pan(-this.span / 4) : move(at.index, at.t - step),
      ArrowRight: () => e.shiftKey ? this.pan(this.span / 4) : move(at.index, at.t + step),
      ArrowUp: () => move(at.index - 1, at.t), ArrowDown: () => move(at.index + 1, at.t),
      Home: () => move(0, at.t), End: () => move(this.ordered.length - 1, at.t),
      Enter: () => { const info = this.describe(at.index, at.t); if (info?.requests.length) { const b = this.canvas.getBoundingClientRect(); this.onPick?.(info, { x: b.left + this.x(at.t), y: b.top + this.y(at.index) }); } },
      "+": () => this.setSpan(this.span / 1.5, at.t), "=": () => this.setSpan(this.span / 1.5, at.t),
      "-": () => this.setSpan(this.span * 1.5, at.t), "0": () => this.follow(true),
      "[": () => this.setRowHeight(this.rowCss / 1.4), "]": () => this.setRowHeight(this.rowCss * 1.4),
      Escape: () => this.point(null),
    };
    if (keys[e.key]) { e.preventDefault(); keys[e.key](); }
  }
  /** What the picture leaves out or joins, in words. */
  decimation() {
    const ms = this.msPerColumn / 1;
    const text = [`1 px = ${duration(ms * this.ratio)}`, this.rowPx - 1 < STACK_FROM ? "each pixel blends what its time went to" : "each column stacks what its time went to"];
    if (this.live && this.rowCss >= LANES_FROM) text.push(`request lanes: ${this.lanesDrawn[0]} of ${this.lanesDrawn[1]}`);
    else if (this.live) text.push("requests: point at a row, or make rows taller");
    return text;
  }
}

export function seconds(ms) {
  const s = Math.abs(ms) / 1000;
  return s >= 120 && Math.round(s) % 60 === 0 ? `${s / 60} min` : s >= 1 || s === 0 ? `${+s.toPrecision(6)} s` : `${+(s * 1000).toPrecision(4)} ms`;
}
const duration = ms => ms >= 1000 ? `${(ms / 1000).toPrecision(2)} s` : ms >= 1 ? `${+ms.toPrecision(2)} ms` : `${+(1000 * ms).toPrecision(2)} µs`;
const mix = (a, b, k) => [a[0] + (b[0] - a[0]) * k, a[1] + (b[1] - a[1]) * k, a[2] + (b[2] - a[2]) * k].map(Math.round);
const pack = c => (255 << 24 | c[2] << 16 | c[1] << 8 | c[0]) >>> 0;
function shape(g, role, x, y, r, colour) {
  g.fillStyle = colour; g.beginPath();
  if (role === "prefill") { g.moveTo(x - r, y - r); g.lineTo(x + r, y); g.lineTo(x - r, y + r); g.closePath(); }
  else g.arc(x, y, r, 0, 7);
  g.fill();
}
const widths = new Map();
function fitted(g, text, room) {
  const key = text + "|" + Math.round(room);
  let found = widths.get(key);
  if (found === undefined) {
    found = text;
    // The end of a name tells workers apart: what goes is the middle.
    for (let keep = text.length - 2; keep > 3 && g.measureText(found).width > room; keep--)
      found = text.slice(0, Math.ceil(keep / 2)) + "…" + text.slice(text.length - Math.floor(keep / 2));
    if (widths.size > 4000) widths.clear();
    widths.set(key, found);
  }
  return found;
}
function loadWords(row, small) {
  const [, state, running, waiting] = row.load;
  if (state === SILENT || row.goneAt) return "silent";
  const busy = running || waiting ? `${running} run${waiting ? `, ${waiting} wait` : ""}` : "idle";
  return state === DRAINING ? "draining, " + busy : small ? busy : `${busy} · KV ${Math.round(100 * row.load[5])} %`;
}
