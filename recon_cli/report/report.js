// The viewer and the plots of a report. All data lie in the page; nothing is loaded.

const byId = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const facts = JSON.parse(byId("facts").textContent);
const { rows, columns, layers, palettes, slices, spacing, unit } = facts;
const SIZE = rows * columns;
const DRAG_PER_SLICE = 24; // CSS pixels
const WHEEL_PER_SLICE = 40;
const KEPT_BYTES = 96e6;
const EXACT = 1e-3; // chi-square that is drawn as exact fit, such as zero filling has

layers.forEach((layer, index) => Object.assign(layer, { index }));
const images = layers.filter((layer) => layer.kind === "image");
const truth = images.find((layer) => layer.key === "truth");
const own = images.find((layer) => layer.key === "prior") ?? images[images.length - 1];

// --- pixel data: median-edge prediction, zigzag, two planes of bytes, deflate, base64 ----------

async function unpack(layer, k) {
  const packed = Uint8Array.from(atob(byId(`px-${layer.index}-${k}`).textContent), (c) =>
    c.charCodeAt(0),
  );
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const q = new Uint16Array(SIZE);
  for (let i = 0, at = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++, at++) {
      const a = j ? q[at - 1] : 0;
      const b = i ? q[at - columns] : 0;
      const plane = a + b - (i && j ? q[at - columns - 1] : 0);
      const median = Math.min(Math.max(plane, Math.min(a, b)), Math.max(a, b));
      const z = planes[at] | (planes[SIZE + at] << 8);
      q[at] = median + ((z >> 1) ^ -(z & 1)); // modulo 2^16
    }
  }
  return q;
}

const kept = new Map(); // slice -> promise of the levels of every layer, oldest first
const KEEP = Math.max(3, Math.floor(KEPT_BYTES / (2 * SIZE * layers.length)));

function levelsOf(k) {
  const found = kept.get(k) ?? Promise.all(layers.map((layer) => unpack(layer, k)));
  kept.delete(k);
  kept.set(k, found);
  while (kept.size > KEEP) kept.delete(kept.keys().next().value);
  return found;
}

// --- state -------------------------------------------------------------------------------------

const last = slices.length - 1;
const view = {
  k: slices.length >> 1, // the middle one, as of the figures
  low: facts.windows[0].low,
  high: facts.windows[0].high,
  overlay: "",
  opacity: 0.7,
  mode: "panels",
  split: 0.5,
  tool: "slice",
  zoom: 1,
  cx: columns / 2,
  cy: rows / 2,
  line: null, // [x0, y0, x1, y1] in pixels, whole numbers are edges of pixels
  box: null, // likewise
  at: null, // pixel under the pointer
};
let shown = null; // levels of every layer of the slice on screen
const pictures = new Map(); // layer index -> { grey, heat }, canvases of the slice on screen

const value = (layer, at) => layer.base + layer.step * shown[layer.index][at];
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const digits = unit === "HU" ? 0 : 3;
const format = (x, more = 0) =>
  unit === "HU" ? x.toFixed(digits + more) : Number(x.toPrecision(digits + more)).toString();

async function show(k) {
  view.k = clamp(k, 0, last);
  byId("slice").value = view.k;
  byId("slice").setAttribute("aria-valuetext", `slice ${view.k + 1} of ${slices.length}`);
  byId("where").textContent = `${view.k + 1} / ${slices.length}`;
  const wanted = view.k;
  const levels = await levelsOf(wanted);
  if (wanted !== view.k) return;
  shown = levels;
  pictures.clear();
  for (const figure of all("#panels figure")) {
    const score = facts.scores.psnr?.[figure.dataset.key]?.[view.k];
    figure.querySelector(".note").textContent = score == null ? "" : `${score.toFixed(1)} dB`;
  }
  byId("source").textContent = `slice ${slices[view.k]} of the source`;
  document.body.dataset.slice = view.k;
  refresh();
  drawScores();
  for (const near of [view.k + 1, view.k - 1]) if (near >= 0 && near <= last) levelsOf(near);
}

// --- pictures ----------------------------------------------------------------------------------

function blank() {
  const canvas = document.createElement("canvas");
  canvas.width = columns;
  canvas.height = rows;
  return canvas;
}

function paint(canvas, colour) {
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  const packed = new Uint32Array(pixels.data.buffer); // little-endian: alpha, blue, green, red
  for (let at = 0; at < SIZE; at++) packed[at] = colour(at);
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function greyOf(layer) {
  const lut = new Uint8ClampedArray(layer.levels);
  const scale = 255 / Math.max(view.high - view.low, 1e-12);
  for (let q = 0; q < layer.levels; q++) lut[q] = (layer.base + layer.step * q - view.low) * scale;
  const levels = shown[layer.index];
  return paint(blank(), (at) => 0xff000000 | (lut[levels[at]] * 0x010101));
}

const bytesOf = new Map(
  Object.entries(palettes).map(([name, text]) => [
    name,
    Uint8Array.from(atob(text), (c) => c.charCodeAt(0)),
  ]),
);

/** What the overlay shows: its scale, and the values that it lays over an image, if any. */
function overlay() {
  if (view.overlay === "error") {
    const of = (layer) =>
      layer === truth ? null : (at) => Math.abs(value(layer, at) - value(truth, at));
    return { palette: "error", low: 0, high: facts.errorTop, of, title: "|error|", unit };
  }
  const map = layers.find((layer) => layer.kind === "map" && layer.key === view.overlay);
  if (!map) return null;
  const of = (layer) => (layer === own ? (at) => value(map, at) : null);
  return { ...map, of };
}

function heatOf(layer, scale) {
  const of = scale.of(layer);
  if (!of) return null;
  const colours = bytesOf.get(scale.palette);
  const signed = scale.low < 0;
  return paint(blank(), (at) => {
    const t = clamp((of(at) - scale.low) / (scale.high - scale.low), 0, 1);
    const weight = signed ? Math.abs(2 * t - 1) : t;
    // low values let the image through, but the whole map is shown at full opacity
    const alpha = 255 * view.opacity * weight ** (2 - 2 * view.opacity);
    const c = 3 * Math.round(255 * t);
    return ((alpha << 24) | (colours[c + 2] << 16) | (colours[c + 1] << 8) | colours[c]) >>> 0;
  });
}

function pictureOf(layer) {
  let found = pictures.get(layer.index);
  if (!found) {
    const scale = overlay();
    found = { grey: greyOf(layer), heat: scale && heatOf(layer, scale) };
    pictures.set(layer.index, found);
  }
  return found;
}

/** From pixels of the image to device pixels of a canvas: x sx + ox, y sy + oy. */
function transform(canvas) {
  const fit = Math.min(
    canvas.width / (columns * spacing[1]),
    canvas.height / (rows * spacing[0]),
  );
  const sx = fit * view.zoom * spacing[1];
  const sy = fit * view.zoom * spacing[0];
  return { sx, sy, ox: canvas.width / 2 - view.cx * sx, oy: canvas.height / 2 - view.cy * sy };
}

function draw(canvas, first, second) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio);
  const height = Math.round(canvas.clientHeight * ratio);
  if (!width || !shown) return;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const t = transform(canvas);
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.fillStyle = "#000";
  context.fillRect(0, 0, width, height);
  const cut = second ? view.split * width : width;
  const put = (layer, from, to) => {
    context.save();
    context.beginPath();
    context.rect(from, 0, to - from, height);
    context.clip();
    context.setTransform(t.sx, 0, 0, t.sy, t.ox, t.oy);
    context.imageSmoothingEnabled = t.sx < 3 * ratio; // zoomed in, pixels are shown as they are
    const { grey, heat } = pictureOf(layer);
    context.drawImage(grey, 0, 0);
    if (heat) context.drawImage(heat, 0, 0);
    context.restore();
  };
  put(first, 0, cut);
  if (second) {
    put(second, cut, width);
    context.fillStyle = "#fff";
    context.fillRect(cut - ratio / 2, 0, ratio, height);
    context.beginPath();
    context.arc(cut, height / 2, 9 * ratio, 0, 7);
    context.fill();
    context.fillStyle = "#0b0e12";
    context.font = `${13 * ratio}px sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText("↔", cut, height / 2 + ratio);
  }
  const stroke = (path) => {
    for (const [style, wide] of [["#000a", 3.5], ["#ffd166", 1.5]]) {
      context.strokeStyle = style;
      context.lineWidth = wide * ratio;
      context.beginPath();
      path();
      context.stroke();
    }
  };
  const x = (u) => u * t.sx + t.ox;
  const y = (v) => v * t.sy + t.oy;
  if (view.line) {
    const [x0, y0, x1, y1] = view.line;
    stroke(() => {
      context.moveTo(x(x0), y(y0));
      context.lineTo(x(x1), y(y1));
      context.moveTo(x(x0) + 3 * ratio, y(y0));
      context.arc(x(x0), y(y0), 3 * ratio, 0, 7);
    });
  }
  if (view.box) {
    const [x0, y0, x1, y1] = pixelsIn(view.box);
    stroke(() => context.rect(x(x0), y(y0), x(x1) - x(x0), y(y1) - y(y0)));
  }
  if (view.at) {
    const [u, v] = [x(view.at[0] + 0.5), y(view.at[1] + 0.5)];
    context.fillStyle = "#7cc4ff";
    context.fillRect(u - 6 * ratio, v - ratio / 2, 12 * ratio, ratio);
    context.fillRect(u - ratio / 2, v - 6 * ratio, ratio, 12 * ratio);
  }
}

const chosen = (id) => images[Number(byId(id).value)];

function redraw() {
  if (view.mode === "swipe") {
    draw(byId("swipe-canvas"), chosen("first"), chosen("second"));
  } else {
    all("#panels canvas").forEach((canvas, i) => draw(canvas, images[i]));
  }
  readOut();
}

let queued = false;
function later() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    redraw();
  });
}

/** After a change of slice, window or overlay. */
function repaint() {
  pictures.clear();
  later();
}

/** After a change of slice or of what is measured. */
function refresh() {
  later();
  measure();
}

function readOut() {
  const at = view.at && view.at[1] * columns + view.at[0];
  const text = (layer) => (view.at && shown ? `${format(value(layer, at))} ${unit}` : "");
  all("#panels figure").forEach((figure, i) => {
    figure.querySelector(".value").textContent = text(images[i]);
  });
  const [first, second] = [chosen("first"), chosen("second")];
  byId("swipe-first").textContent = `${first.title} ${text(first)}`;
  byId("swipe-second").textContent = `${text(second)} ${second.title}`;
  byId("position").textContent = view.at
    ? `column ${view.at[0]}, row ${view.at[1]}`
    : `zoom ${view.zoom.toFixed(1)}`;
}

// --- window, overlay, layout -------------------------------------------------------------------

function setWindow(low, high, preset = "custom") {
  view.low = low;
  view.high = Math.max(high, low + 1e-6 * facts.span);
  byId("preset").value = preset;
  byId("level").value = format((view.low + view.high) / 2);
  byId("width").value = format(view.high - view.low);
  repaint();
}

function setOverlay(key) {
  view.overlay = key;
  byId("overlay").value = key;
  const scale = overlay();
  byId("legend").hidden = !scale;
  byId("opacity").disabled = !scale;
  if (scale) {
    const bar = byId("bar").getContext("2d");
    const colours = bytesOf.get(scale.palette);
    for (let i = 0; i < 256; i++) {
      bar.fillStyle = `rgb(${colours.slice(3 * i, 3 * i + 3).join()})`;
      bar.fillRect(i, 0, 1, 1);
    }
    byId("bar-low").textContent = Number(scale.low.toPrecision(3));
    byId("bar-high").textContent = `${Number(scale.high.toPrecision(3))} ${scale.unit}`;
    byId("bar-title").textContent = scale.title;
  }
  repaint();
}

function setMode(mode) {
  view.mode = mode;
  byId(`mode-${mode}`).checked = true;
  byId("panels").hidden = mode === "swipe";
  byId("swipe").hidden = mode !== "swipe";
  byId("pair").hidden = mode !== "swipe";
  later();
}

function setTool(tool) {
  view.tool = tool;
  byId(`tool-${tool}`).checked = true;
  byId("stage").dataset.tool = tool;
}

function setSplit(split) {
  view.split = clamp(split, 0, 1);
  byId("divider").value = Math.round(100 * view.split);
  later();
}

function zoomAt(factor, x, y) {
  const zoom = clamp(view.zoom * factor, 1, 40);
  const moved = 1 - view.zoom / zoom;
  view.cx += (x - view.cx) * moved;
  view.cy += (y - view.cy) * moved;
  view.zoom = zoom;
  if (zoom === 1) [view.cx, view.cy] = [columns / 2, rows / 2];
  later();
}

function reset() {
  Object.assign(view, { zoom: 1, cx: columns / 2, cy: rows / 2, line: null, box: null });
  setWindow(facts.windows[0].low, facts.windows[0].high, "0");
  refresh();
}

// --- measuring ---------------------------------------------------------------------------------

/** Pixels of a rectangle: first column and row, and those after the last. */
function pixelsIn([x0, y0, x1, y1]) {
  const low = (a, b, n) => clamp(Math.round(Math.min(a, b)), 0, n - 1);
  const [u, v] = [low(x0, x1, columns), low(y0, y1, rows)];
  return [
    u,
    v,
    clamp(Math.round(Math.max(x0, x1)), u + 1, columns),
    clamp(Math.round(Math.max(y0, y1)), v + 1, rows),
  ];
}

function statistics(layer, [x0, y0, x1, y1]) {
  let n = 0;
  let sum = 0;
  let squares = 0;
  let misses = 0;
  for (let y = y0; y < y1; y++) {
    for (let at = y * columns + x0; at < y * columns + x1; at++) {
      const v = shown[layer.index][at];
      n += 1;
      sum += v;
      squares += v * v;
      if (truth) misses += (value(layer, at) - value(truth, at)) ** 2;
    }
  }
  const variance = n > 1 ? Math.max(squares - (sum * sum) / n, 0) / (n - 1) : 0;
  return {
    n,
    mean: layer.base + (layer.step * sum) / n,
    sd: layer.step * Math.sqrt(variance),
    rmse: Math.sqrt(misses / n),
  };
}

/** Bilinear values along a line, one a pixel of its length. */
function profile(layer, [x0, y0, x1, y1]) {
  const count = Math.max(2, Math.ceil(Math.hypot(x1 - x0, y1 - y0)) + 1);
  return Array.from({ length: count }, (_, i) => {
    const t = i / (count - 1);
    const x = clamp(x0 + t * (x1 - x0) - 0.5, 0, columns - 1);
    const y = clamp(y0 + t * (y1 - y0) - 0.5, 0, rows - 1);
    const [u, v] = [Math.min(Math.floor(x), columns - 2), Math.min(Math.floor(y), rows - 2)];
    const [a, b] = [x - u, y - v];
    const at = v * columns + u;
    return (
      (1 - b) * ((1 - a) * value(layer, at) + a * value(layer, at + 1)) +
      b * ((1 - a) * value(layer, at + columns) + a * value(layer, at + columns + 1))
    );
  });
}

function element(name, text, className) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

function measure() {
  if (!shown) return;
  byId("profile-hint").hidden = Boolean(view.line);
  byId("profile-plot").hidden = !view.line;
  if (view.line) {
    const [x0, y0, x1, y1] = view.line;
    const length = Math.hypot((x1 - x0) * spacing[1], (y1 - y0) * spacing[0]);
    const lines = images.map((layer) => {
      const to = profile(layer, view.line);
      return { style: layer.style, to, at: to.map((_, i) => (length * i) / (to.length - 1)) };
    });
    plot(byId("profile"), { lines, x: "distance in mm", y: unit });
  }
  byId("roi-hint").hidden = Boolean(view.box);
  byId("roi").hidden = !view.box;
  if (view.box) {
    const box = pixelsIn(view.box);
    const body = byId("roi-rows");
    body.replaceChildren();
    let n = 0;
    for (const layer of layers) {
      if (layer.kind === "map" && layer.unit !== unit) continue;
      const found = statistics(layer, box);
      n = found.n;
      const row = element("tr");
      row.append(element("th", layer.title));
      row.append(element("td", format(found.mean, 1)), element("td", format(found.sd, 1)));
      if (truth) {
        const compared = layer.kind === "image" && layer !== truth;
        row.append(element("td", compared ? format(found.rmse, 1) : "–"));
      }
      body.append(row);
    }
    const [w, h] = [(box[2] - box[0]) * spacing[1], (box[3] - box[1]) * spacing[0]];
    const size = `${w.toFixed(1)} × ${h.toFixed(1)} mm`;
    byId("roi-size").textContent = `n = ${n} pixels, ${size}, from column ${box[0]}, row ${box[1]}`;
  }
}

// --- plots -------------------------------------------------------------------------------------

function svg(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, item] of Object.entries(attributes)) node.setAttribute(key, item);
  if (text !== undefined) node.textContent = text;
  return node;
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

function decades(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    found.push(10 ** e);
  }
  return found.length > 7 ? found.filter((_, i) => i % 2 === 0) : found;
}

const plots = new Map(); // node -> specification, to draw again when its width changes

/** Axes of a plot: its frame, the ranges of x and y, and the maps from values to pixels. */
function axesOf(spec, width) {
  const { lines, log, names } = spec;
  const usual = Math.min(260, 120 + width / 4);
  const height = names ? Math.max(usual, 50 + 40 * names.length) : usual; // as the plot beside it
  const left = names ? Math.min(130, 0.34 * width) : 54;
  const frame = { left, right: width - 12, top: 10, bottom: height - 40 };
  const defined = (v) => Number.isFinite(v) && (!log || v > 0); // no logarithm of 0
  const ends = (values) => [Math.min(...values), Math.max(...values)];
  const xs = lines.flatMap((line) => [...line.at, ...(names ? [...line.low, ...line.high] : [])]);
  let [x0, x1] = ends(xs.filter(Number.isFinite));
  let [y0, y1] = spec.range ?? ends(lines.flatMap((line) => line.to).filter(defined));
  if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
  if (y0 === y1) [y0, y1] = log ? [y0 / 2, y1 * 2] : [y0 - 1, y1 + 1];
  if (names) {
    const room = 0.06 * (x1 - x0);
    [x0, x1, y0, y1] = [x0 - room, x1 + room, names.length - 0.5, -0.5]; // the first on top
  } else if (!spec.range) {
    const room = log ? (y1 / y0) ** 0.06 : 0.06 * (y1 - y0);
    [y0, y1] = log ? [y0 / room, y1 * room] : [y0 - room, y1 + room];
  }
  const f = log ? Math.log : (v) => v;
  const x = (v) => frame.left + ((v - x0) / (x1 - x0)) * (frame.right - frame.left);
  const y = (v) => frame.bottom - ((f(v) - f(y0)) / (f(y1) - f(y0))) * (frame.bottom - frame.top);
  return { ...frame, width, height, x, y, x0, x1, y0, y1, defined };
}

function rule(x1, y1, x2, y2, style) {
  return svg("line", { class: style, x1, y1, x2, y2 });
}

function note(text, x, y, anchor, style = "tick") {
  return svg("text", { class: style, x, y, "text-anchor": anchor }, text);
}

/** Grid, ticks, labels and marker. */
function* scaffold(spec, a) {
  const short = (v) => (Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-2) ? v.toExponential(0) : v);
  for (const v of ticks(a.x0, a.x1, clamp(a.width / 90, 3, 8))) {
    if (spec.whole && v % 1) continue;
    yield rule(a.x(v), a.top, a.x(v), a.bottom, "grid");
    yield note(short(v), a.x(v), a.bottom + 16, "middle");
  }
  yield note(spec.x, (a.left + a.right) / 2, a.height - 6, "middle", "label");
  if (spec.marker !== undefined) {
    yield rule(a.x(spec.marker), a.top, a.x(spec.marker), a.bottom, "marker");
  }
  if (spec.names) {
    for (const [i, name] of spec.names.entries()) {
      yield note(name, a.left - 10, a.y(i) + 4, "end", "name");
    }
    return;
  }
  for (const v of spec.log ? decades(a.y0, a.y1) : ticks(a.y0, a.y1, 5)) {
    if (v < a.y0 || v > a.y1) continue;
    yield rule(a.left, a.y(v), a.right, a.y(v), "grid");
    yield note(short(v), a.left - 7, a.y(v) + 4, "end");
  }
  const label = note(spec.y, 0, 0, "middle", "label");
  label.setAttribute("transform", `translate(13 ${(a.top + a.bottom) / 2}) rotate(-90)`);
  yield label;
}

/** One line: its band, then the line with its dots; or, by name, means with their intervals. */
function* trace(line, spec, a) {
  const order = (points) => points.map(([u, v]) => `${u.toFixed(1)},${v.toFixed(1)}`).join(" ");
  const dot = (cx, cy, r) => svg("circle", { class: `dot ${line.style}`, cx, cy, r });
  const path = line.at
    .map((v, i) => [v, line.to[i]])
    .filter(([, v]) => a.defined(v))
    .map(([u, v]) => [a.x(u), a.y(v)]);
  if (spec.names) {
    for (const [i, [u, v]] of path.entries()) {
      yield rule(a.x(line.low[i]), v, a.x(line.high[i]), v, `whisker ${line.style}`);
      yield dot(u, v, 4.5);
    }
    return;
  }
  if (line.band) {
    const [low, high] = line.band.map((end) => line.at.map((v, i) => [a.x(v), a.y(end[i])]));
    const points = order([...high, ...low.reverse()]);
    yield svg("polygon", { class: `band ${line.style}`, points });
    return;
  }
  const dashed = line.dashed ? " dashed" : "";
  yield svg("polyline", { class: `line ${line.style}${dashed}`, points: order(path) });
  if (line.dots) for (const [u, v] of path) yield dot(u, v, 2.6);
}

/**
 * Draw lines into an svg element, again whenever its width changes.
 *
 * `lines`: { style, at, to } and as wanted dots, dashed, band: [low, high]; with `names`, a name
 * for each row from the top, `at` are means, `to` rows, and low and high the ends of intervals.
 * `x`, `y`: labels; `log`: of y; `range`: of y; `marker`: x of a vertical line; `whole`: x counts.
 */
function plot(node, spec) {
  plots.set(node, spec);
  if (!node.clientWidth) return;
  const a = axesOf(spec, node.clientWidth);
  if (![a.x0, a.x1, a.y0, a.y1].every(Number.isFinite)) return;
  const parts = [...scaffold(spec, a), ...spec.lines.flatMap((line) => [...trace(line, spec, a)])];
  node.setAttribute("viewBox", `0 0 ${a.width} ${a.height}`);
  node.setAttribute("height", a.height);
  node.replaceChildren(svg("title", {}, node.getAttribute("aria-label")), ...parts);
}

function drawScores() {
  const chosenScore = document.querySelector("#score input:checked")?.value;
  if (!chosenScore) return;
  const { label } = facts.scoreLabels[chosenScore];
  const rowsOf = facts.methods.filter((m) => facts.scores[chosenScore][m.key]);
  plot(byId("score-means"), {
    names: rowsOf.map((m) => m.title),
    lines: rowsOf.map((m, i) => {
      const { mean, ci95 } = m[chosenScore];
      const [low, high] = ci95 ?? [mean, mean];
      return { style: m.style, at: [mean], to: [i], low: [low], high: [high] };
    }),
    x: `${label}, mean and 95 % interval`,
  });
  if (slices.length < 2) return;
  plot(byId("score-slices"), {
    lines: rowsOf.map((m) => ({
      style: m.style,
      at: slices,
      to: facts.scores[chosenScore][m.key],
      dots: slices.length < 60,
    })),
    x: "slice of the source",
    y: label,
    marker: slices[view.k],
    whole: true,
  });
}

function drawTrust() {
  if (facts.residual) {
    const { at, methods, expected, axis } = facts.residual;
    const lines = methods.map((m) => ({
      style: m.style,
      at,
      to: m.value.map((v) => Math.max(v, EXACT)),
      dots: at.length < 60,
      dashed: m.dashed,
    }));
    if (expected) lines.unshift({ style: "s-truth", at, to: expected.flat(), band: expected });
    plot(byId("residual"), { lines, x: axis, y: "residual χ² per datum", log: true });
  }
  if (facts.coverage) {
    const { nominal, covered } = facts.coverage;
    plot(byId("coverage"), {
      lines: [
        { style: "s-truth", at: [0, 100], to: [0, 100], dashed: true },
        { style: "s-prior", at: nominal, to: covered, dots: true },
      ],
      x: "promised share of pixels in %",
      y: "truth inside, %",
      range: [0, 100],
    });
    const { std, rmse } = facts.coverage;
    const end = Math.max(...std, ...rmse);
    plot(byId("spread"), {
      lines: [
        { style: "s-truth", at: [0, end], to: [0, end], dashed: true },
        { style: "s-prior", at: std, to: rmse, dots: true },
      ],
      x: `std of samples in ${unit}`,
      y: `rms error in ${unit}`,
    });
  }
}

// --- pointer, wheel, touch ---------------------------------------------------------------------

const pointers = new Map();
let drag = null;

function place(canvas, { clientX, clientY }) {
  const box = canvas.getBoundingClientRect();
  const ratio = canvas.width / box.width;
  const t = transform(canvas);
  return [
    ((clientX - box.left) * ratio - t.ox) / t.sx,
    ((clientY - box.top) * ratio - t.oy) / t.sy,
  ];
}

function pinch() {
  const [p, q] = [...pointers.values()];
  return {
    clientX: (p.clientX + q.clientX) / 2,
    clientY: (p.clientY + q.clientY) / 2,
    apart: Math.hypot(p.clientX - q.clientX, p.clientY - q.clientY),
  };
}

function follow(canvas, event) {
  const [x, y] = place(canvas, event);
  const inside = x >= 0 && y >= 0 && x < columns && y < rows;
  view.at = inside ? [Math.floor(x), Math.floor(y)] : null;
  later();
}

function onDivider(canvas, event) {
  const box = canvas.getBoundingClientRect();
  return Math.abs(event.clientX - box.left - view.split * box.width) < 16;
}

function down(canvas, event) {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, event);
  if (pointers.size === 2) {
    drag = { tool: "pinch", last: pinch() };
    return;
  }
  let { tool } = view;
  if (event.button === 2) tool = "window";
  else if (event.button === 1 || event.shiftKey) tool = "move";
  else if (view.mode === "swipe" && (tool === "slice" || onDivider(canvas, event))) tool = "split";
  const [x, y] = [event.clientX, event.clientY];
  drag = { tool, x, y, from: place(canvas, event), start: { ...view } };
  if (tool === "split") move(canvas, event);
  if (event.pointerType === "mouse" && event.button !== 0) event.preventDefault();
}

function move(canvas, event) {
  follow(canvas, event);
  if (!drag || !pointers.has(event.pointerId)) return;
  pointers.set(event.pointerId, event);
  const { tool, start } = drag;
  if (tool === "pinch") {
    const now = pinch();
    const [x, y] = place(canvas, now);
    const [u, v] = place(canvas, drag.last);
    view.cx -= x - u;
    view.cy -= y - v;
    zoomAt(now.apart / Math.max(drag.last.apart, 1), ...place(canvas, now));
    drag.last = now;
    return;
  }
  const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
  const here = place(canvas, event);
  if (tool === "slice") {
    const k = clamp(start.k + Math.round((dx + dy) / DRAG_PER_SLICE), 0, last);
    if (k !== view.k) show(k);
  } else if (tool === "window") {
    const rate = facts.span / 1024;
    const width = Math.max(start.high - start.low + dx * rate, facts.span / 4096);
    const level = (start.low + start.high) / 2 + dy * rate;
    setWindow(level - width / 2, level + width / 2);
  } else if (tool === "move") {
    const t = transform(canvas);
    const ratio = canvas.width / canvas.clientWidth;
    view.cx = start.cx - (dx * ratio) / t.sx;
    view.cy = start.cy - (dy * ratio) / t.sy;
    later();
  } else if (tool === "split") {
    const box = canvas.getBoundingClientRect();
    setSplit((event.clientX - box.left) / box.width);
  } else if (Math.hypot(dx, dy) > 2) {
    view[tool === "profile" ? "line" : "box"] = [...drag.from, ...here];
    refresh();
  }
}

function up(canvas, event) {
  pointers.delete(event.pointerId);
  drag = null;
}

let turned = 0;
function wheel(canvas, event) {
  const delta = event.deltaY * (event.deltaMode ? 16 : 1);
  if (event.ctrlKey || event.metaKey) {
    event.preventDefault();
    zoomAt(Math.exp(-delta / 300), ...place(canvas, event));
    return;
  }
  const ahead = delta > 0 ? view.k < last : view.k > 0;
  if (!ahead) return; // at the ends of the stack the page scrolls
  event.preventDefault();
  turned += delta;
  const steps = Math.trunc(turned / WHEEL_PER_SLICE);
  turned -= steps * WHEEL_PER_SLICE;
  if (steps) show(view.k + steps);
}

// --- keyboard ----------------------------------------------------------------------------------

function shiftMarks(dx, dy) {
  for (const name of ["line", "box"]) {
    if (view[name]) view[name] = view[name].map((v, i) => v + (i % 2 ? dy : dx));
  }
  refresh();
}

function cycle(select) {
  const options = [...select.options].filter((option) => !option.hidden);
  const next = options[(options.indexOf(select.selectedOptions[0]) + 1) % options.length];
  select.value = next.value;
  select.dispatchEvent(new Event("change"));
}

const arrows = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
const keys = {
  ArrowUp: () => show(view.k - 1),
  ArrowLeft: () => show(view.k - 1),
  ArrowDown: () => show(view.k + 1),
  ArrowRight: () => show(view.k + 1),
  PageUp: () => show(view.k - 5),
  PageDown: () => show(view.k + 5),
  Home: () => show(0),
  End: () => show(last),
  "+": () => zoomAt(1.25, view.cx, view.cy),
  "=": () => zoomAt(1.25, view.cx, view.cy),
  "-": () => zoomAt(0.8, view.cx, view.cy),
  0: reset,
  w: () => cycle(byId("preset")),
  o: () => cycle(byId("overlay")),
  c: () => setMode(view.mode === "swipe" ? "panels" : "swipe"),
  "[": () => setSplit(view.split - 0.05),
  "]": () => setSplit(view.split + 0.05),
  p: () => {
    view.line = view.line ? null : [0.1 * columns, rows / 2, 0.9 * columns, rows / 2];
    refresh();
  },
  r: () => {
    const [u, v] = [columns / 2, rows / 2];
    view.box = view.box ? null : [0.9 * u, 0.9 * v, 1.1 * u, 1.1 * v];
    refresh();
  },
};

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.shiftKey && arrows[event.key]) shiftMarks(...arrows[event.key]);
  else if (keys[event.key]) keys[event.key]();
  else return;
  event.preventDefault();
}

// --- start -------------------------------------------------------------------------------------

function listen() {
  const stage = byId("stage");
  const ratio = (columns * spacing[1]) / (rows * spacing[0]);
  stage.style.setProperty("--ratio", ratio); // bounds the height of the image
  stage.addEventListener("keydown", press);
  for (const canvas of stage.querySelectorAll("canvas")) {
    canvas.style.aspectRatio = ratio;
    canvas.addEventListener("pointerdown", (e) => down(canvas, e));
    canvas.addEventListener("pointermove", (e) => move(canvas, e));
    canvas.addEventListener("pointerup", (e) => up(canvas, e));
    canvas.addEventListener("pointercancel", (e) => up(canvas, e));
    canvas.addEventListener("pointerleave", () => {
      view.at = null;
      later();
    });
    canvas.addEventListener("wheel", (e) => wheel(canvas, e), { passive: false });
    canvas.addEventListener("dblclick", reset);
    canvas.addEventListener("contextmenu", (e) => e.preventDefault());
  }
  const on = (id, event, act) => byId(id).addEventListener(event, (e) => act(e.target));
  on("slice", "input", (node) => show(Number(node.value)));
  on("previous", "click", () => show(view.k - 1));
  on("next", "click", () => show(view.k + 1));
  on("preset", "change", (node) => {
    const found = facts.windows[Number(node.value)];
    if (found) setWindow(found.low, found.high, node.value);
  });
  const typed = () => {
    const [level, width] = [Number(byId("level").value), Number(byId("width").value)];
    if (Number.isFinite(level) && width > 0) setWindow(level - width / 2, level + width / 2);
  };
  on("level", "change", typed);
  on("width", "change", typed);
  on("overlay", "change", (node) => setOverlay(node.value));
  on("opacity", "input", (node) => {
    view.opacity = Number(node.value) / 100;
    repaint();
  });
  on("first", "change", later);
  on("second", "change", later);
  on("divider", "input", (node) => setSplit(Number(node.value) / 100));
  on("reset", "click", reset);
  for (const node of all("#mode input")) node.addEventListener("change", () => setMode(node.value));
  for (const node of all("#tool input")) node.addEventListener("change", () => setTool(node.value));
  for (const node of all("#score input")) node.addEventListener("change", drawScores);
  const watch = new ResizeObserver(() => {
    later();
    for (const [node, spec] of plots) plot(node, spec);
  });
  watch.observe(document.body);
}

async function start() {
  byId("viewer").hidden = false;
  byId("measures").hidden = false;
  for (const node of all(".plots")) node.hidden = false;
  byId("second").value = images.indexOf(own);
  byId("first").value = images.indexOf(images.find((layer) => layer !== own) ?? own);
  listen();
  setWindow(view.low, view.high, "0");
  setOverlay("");
  setMode("panels");
  setTool("slice");
  drawTrust();
  await show(view.k);
}

if ("DecompressionStream" in window) start();
else byId("old").hidden = false;
