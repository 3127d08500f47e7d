"use strict";
// Elements, scales and axes. Text is always set as text, never as markup.

function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined) element.append(child);
  }
  return element;
}

function scale(low, high, from, to) {
  const span = high - low || 1;
  const at = (value) => from + ((value - low) / span) * (to - from);
  at.inverse = (place) => low + ((place - from) / (to - from)) * span;
  at.low = low;
  at.high = high;
  return at;
}

// Round numbers that cover [low, high], about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(+(k * step).toPrecision(12));
  return found;
}

// The frame of a chart: an SVG with axes, and its two scales.
function frame({ width = 340, height = 200, x, y, xLabel, yLabel, label, whole = false, left = yLabel ? 46 : 34, yTicks = true }) {
  const right = 12, top = 10, bottom = xLabel ? 36 : 22;
  const sx = scale(x[0], x[1], left, width - right);
  const sy = scale(y[0], y[1], height - bottom, top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const value of yTicks ? ticks(y[0], y[1], 4) : []) {
    root.append(
      svg("line", { class: "axis", x1: left, x2: width - right, y1: sy(value), y2: sy(value) }),
      svg("text", { x: left - 5, y: sy(value) + 4, "text-anchor": "end" }, `${value}`),
    );
  }
  const marks = ticks(x[0], x[1], Math.min(6, width / 55)).filter((value) => !whole || Number.isInteger(value));
  for (const value of marks) {
    root.append(svg("text", { x: sx(value), y: height - bottom + 15, "text-anchor": "middle" }, `${value}`));
  }
  if (xLabel) root.append(svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, xLabel));
  if (yLabel) {
    const place = (top + height - bottom) / 2;
    root.append(svg("text", { transform: `translate(11 ${place}) rotate(-90)`, "text-anchor": "middle" }, yLabel));
  }
  return { root, sx, sy, width, height, left, right, top, bottom };
}

// A line through what is known; it breaks where nothing is.
function path(at, values, sx, sy) {
  let d = "", pen = false;
  values.forEach((value, index) => {
    if (value === null) pen = false;
    else {
      d += `${pen ? "L" : "M"}${sx(at[index]).toFixed(1)} ${sy(value).toFixed(1)}`;
      pen = true;
    }
  });
  return d;
}

// The area between mean - half and mean + half, cut off at the frame.
function area(at, mean, half, sx, sy) {
  const cut = (value) => Math.min(sy.high, Math.max(sy.low, value));
  let d = "", run = [];
  const close = () => {
    if (run.length > 1) {
      const upper = run.map((i) => `${sx(at[i]).toFixed(1)} ${sy(cut(mean[i] + half[i])).toFixed(1)}`);
      const lower = run.map((i) => `${sx(at[i]).toFixed(1)} ${sy(cut(mean[i] - half[i])).toFixed(1)}`).reverse();
      d += `M${upper.join("L")}L${lower.join("L")}Z`;
    }
    run = [];
  };
  mean.forEach((value, index) => (value === null || half[index] === null ? close() : run.push(index)));
  close();
  return d;
}

// A pale yellow to a deep blue: even in lightness, so that it is read without colours, too.
const RAMP = [[255, 250, 222], [207, 226, 190], [120, 184, 190], [54, 125, 172], [32, 63, 128], [16, 22, 62]];

function shade(share) {
  const place = Math.min(1, Math.max(0, share)) * (RAMP.length - 1);
  const index = Math.min(RAMP.length - 2, Math.floor(place));
  const mix = RAMP[index].map((low, k) => Math.round(low + (RAMP[index + 1][k] - low) * (place - index)));
  const bright = (0.299 * mix[0] + 0.587 * mix[1] + 0.114 * mix[2]) / 255;
  return { back: `rgb(${mix.join(",")})`, ink: bright > 0.55 ? "#10141a" : "#ffffff" };
}
