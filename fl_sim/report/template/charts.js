"use strict";
// The pictures: curves, heat map, cost against effect, durability, detection.

const shown = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const target = (index) => `#g${index}`;
const SCORES = [["asr", "ASR"], ["acc", "ACC"]];

function figure(group, index, chart, caption, named = true) {
  return make("figure", {},
    make("h4", {}, make("a", { href: target(index) }, group.defense)),
    make("div", { class: "setting" }, `${named ? `${group.setting} · ` : ""}n = ${group.seeds}`),
    chart, caption);
}

// ACC and ASR by round with their bands, the erasings, and ASR without a defense.
function curves(group, index, groups) {
  const known = SCORES.filter(([key]) => group.curves[key]);
  const all = known.flatMap(([key]) => group.curves[key].at);
  if (!all.length) return null;
  const unit = group.kind === "federated" ? "round" : "epoch";
  // One axis for the setting, so that its curves can be compared, and an unfinished one is seen to be.
  const beside = groups.filter((other) => other.kind === group.kind && other.setting === group.setting);
  const last = Math.max(...beside.flatMap((other) => Object.values(other.curves)).map((band) => band.at.at(-1) ?? 0)), first = Math.min(...all);
  const f = frame({ x: [first, Math.max(last, first + 1)], y: [0, 1], xLabel: unit, label: `${group.setting}, ${group.defense}: ${group.sentence}`, whole: true });
  for (const [at, taken, refused] of group.erasings) {
    f.root.append(svg("line", { class: "erasing", x1: f.sx(at), x2: f.sx(at), y1: f.top, y2: f.height - f.bottom },
      svg("title", {}, `erasing after round ${at}: ${taken} taken, ${refused} refused`)));
    if (refused) f.root.append(svg("text", { x: f.sx(at), y: f.top + 4, "text-anchor": "middle" }, "×"));
  }
  const control = group.control === null ? null : groups[group.control].curves.asr;
  if (control) f.root.append(svg("path", { class: "reference", d: path(control.at, control.mean, f.sx, f.sy) }));
  for (const [key] of known) {
    const band = group.curves[key];
    f.root.append(svg("path", { class: `${key} band`, d: area(band.at, band.mean, band.half, f.sx, f.sy) }));
  }
  for (const [key] of known) {
    const band = group.curves[key];
    f.root.append(svg("path", { class: `${key} line`, d: path(band.at, band.mean, f.sx, f.sy) }));
    if (band.at.length === 1) {
      f.root.append(svg("circle", { class: `${key} fill`, cx: f.sx(band.at[0]), cy: f.sy(band.mean[0] ?? 0), r: 3 }));
    }
  }
  nameLines(f, known.map(([key, name]) => ({ key, name, band: group.curves[key] })));
  const readout = make("div", { class: "readout" });
  follow(f, known, group, unit, readout);
  return figure(group, index, f.root, readout, false);
}

// Each line's name beside its end, pushed apart where they meet.
function nameLines(f, lines) {
  const places = lines.map(({ key, name, band }) => {
    const value = band.mean.findLast((each) => each !== null) ?? 0;
    return { key, name, y: f.sy(value) + (value > 0.5 ? 14 : -6) };
  });
  if (places.length === 2 && Math.abs(places[0].y - places[1].y) < 13) {
    const upper = places[0].y < places[1].y ? 0 : 1;
    places[1 - upper].y = places[upper].y + 13;
  }
  for (const { key, name, y } of places) {
    f.root.append(svg("text", { class: key, x: f.width - f.right - 2, y, "text-anchor": "end" }, name));
  }
}

// The numbers under the pointer.
function follow(f, known, group, unit, readout) {
  const cursor = svg("line", { class: "cursor", y1: f.top, y2: f.height - f.bottom, visibility: "hidden" });
  f.root.append(cursor);
  const move = (event) => {
    const box = f.root.getBoundingClientRect();
    const value = f.sx.inverse(((event.clientX - box.left) / box.width) * f.width);
    const at = group.curves[known[0][0]].at;
    let near = 0;
    at.forEach((each, index) => { if (Math.abs(each - value) <= Math.abs(at[near] - value)) near = index; });
    const before = near > 0 && at[near - 1] === at[near];
    const parts = known.map(([key, name]) => {
      const { mean, half } = group.curves[key];
      const spread = half[near] === null || half[near] === undefined ? "" : ` ± ${shown(half[near])}`;
      return `${name} ${before ? `${shown(mean[near - 1])} → ` : ""}${shown(mean[near])}${spread}`;
    });
    readout.textContent = `${unit} ${at[near]}: ${parts.join(", ")}`;
    fill(cursor, { x1: f.sx(at[near]), x2: f.sx(at[near]), visibility: "visible" }, []);
  };
  f.root.addEventListener("pointermove", move);
  f.root.addEventListener("pointerdown", move);
  f.root.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); readout.textContent = ""; });
}

// Settings by defenses; the darker the higher.
function heatMap(list, measure) {
  list = list.filter(({ group }) => group.cells[measure.key]);
  const columns = [...new Set(list.map(({ group }) => group.defense))];
  const rows = [...new Set(list.map(({ group }) => group.setting))];
  const values = list.map(({ group }) => group.cells[measure.key]?.mean).filter((value) => value !== undefined);
  const high = measure.digits === 3 ? 1 : Math.max(...values, 1e-9);
  const place = new Map(list.map((each) => [`${each.group.setting}\n${each.group.defense}`, each]));
  const head = make("tr", {}, make("th"), columns.map((name) => make("th", { scope: "col" }, name)));
  const body = rows.map((row) => make("tr", {}, make("th", { scope: "row" }, row), columns.map((column) => {
    const found = place.get(`${row}\n${column}`);
    const value = found?.group.cells[measure.key];
    if (!value) return make("td");
    const { back, ink } = shade(value.mean / high);
    const marks = value.text.replace(/[^†‡]/g, "");
    return make("td", { style: `background:${back};color:${ink}`, title: `${row}, ${column}: ${value.text}, n = ${value.n}` },
      make("a", { href: target(found.index) }, shown(value.mean, measure.digits === 3 ? 2 : 1) + marks));
  })));
  return make("div", { class: "scroll" }, make("table", { class: "heat" }, make("thead", {}, head), make("tbody", {}, body)));
}

// One dot for each defense of a setting, its name beside it.
function scatter(list, xMeasure, yMeasure, { xRange = null, missing = null } = {}) {
  const points = [];
  for (const { group, index } of list) {
    const y = group.cells[yMeasure.key], x = group.cells[xMeasure.key] ?? (missing === null ? null : { mean: missing, half: null });
    if (x && y) points.push({ group, index, x, y });
  }
  if (!points.length) return null;
  if (!xRange && points.every(({ x }) => x.mean === 0)) return null; // nothing that costs anything yet
  const farthest = xRange ? xRange[1] : Math.max(...points.map(({ x }) => x.mean + (x.half ?? 0)), 1e-9) * 1.04;
  const f = frame({
    height: 240, x: [0, farthest], y: [0, 1], xLabel: xMeasure.name, yLabel: yMeasure.name,
    label: `${yMeasure.name} against ${xMeasure.name}: ${points.map(({ group, x, y }) => `${group.defense} ${shown(x.mean, 1)}, ${shown(y.mean)}`).join("; ")}`,
  });
  const taken = [], names = [];
  const crowded = points.length > 8 || points.some(({ group }) => group.defense.length > 24);
  if (!crowded) points.sort((a, b) => a.y.mean - b.y.mean);
  points.forEach(({ group, index, x, y }, order) => {
    const name = crowded ? `${order + 1}` : group.defense;
    const cx = f.sx(Math.min(x.mean, farthest)), cy = f.sy(y.mean);
    const cut = (value, at) => Math.min(at.high, Math.max(at.low, value));
    if (y.half !== null) f.root.append(svg("line", { class: "asr stroke", x1: cx, x2: cx, y1: f.sy(cut(y.mean - y.half, f.sy)), y2: f.sy(cut(y.mean + y.half, f.sy)) }));
    if (x.half !== null) f.root.append(svg("line", { class: "asr stroke", x1: f.sx(cut(x.mean - x.half, f.sx)), x2: f.sx(cut(x.mean + x.half, f.sx)), y1: cy, y2: cy }));
    f.root.append(svg("circle", { class: "asr fill", cx, cy, r: 4 }));
    const end = cx > f.width * 0.6;
    let ty = cy + 4;
    const room = name.length * 6;
    const clash = (place) => taken.some(([ox, oy, other]) => Math.abs(oy - place) < 12 && Math.abs(ox - cx) < Math.max(room, other) + 14);
    for (const step of [0, -12, 12, -24, 24, -36, 36, -48, 48]) {
      const place = Math.min(f.height - f.bottom - 2, Math.max(f.top + 8, cy + 4 + step));
      if (!clash(place)) { ty = place; break; }
    }
    taken.push([cx, ty, room]);
    names.push(svg("a", { href: target(index) }, svg("text", { x: cx + (end ? -8 : 8), y: ty, "text-anchor": end ? "end" : "start" }, name)));
  });
  f.root.append(...names); // over all dots and bars
  if (!crowded) return f.root;
  // Too many names for their place: numbers, and the names below.
  return [f.root, make("figcaption", {}, points.map(({ group, index }, order) => [`${order ? ", " : ""}${order + 1}\u00a0`, make("a", { href: target(index) }, group.defense)]))];
}

// ASR by rounds since an erasing.
function durabilities(list) {
  const known = list.filter(({ group }) => group.after);
  const last = Math.max(...known.map(({ group }) => Math.max(...group.after.at)));
  return known.map(({ group, index }) => {
    const f = frame({ height: 170, x: [0, last], y: [0, 1], xLabel: "rounds since the erasing", label: `${group.setting}, ${group.defense}: ASR by rounds since the erasing`, whole: true });
    f.root.append(
      svg("path", { class: "asr band", d: area(group.after.at, group.after.mean, group.after.half, f.sx, f.sy) }),
      svg("path", { class: "asr line", d: path(group.after.at, group.after.mean, f.sx, f.sy) }));
    const held = group.cells.held;
    return figure(group, index, f.root, make("figcaption", {}, held ? `held for ${held.text} rounds or more` : ""));
  });
}

// A row for each defense: AUROC on the model that the last erasing found (hollow) and on the final one, with intervals.
function dots(list, [before, final]) {
  const rows = list.filter(({ group }) => group.cells[before] || group.cells[final]);
  if (!rows.length) return null;
  const longest = Math.max(...rows.map(({ group }) => group.defense.length));
  const left = Math.min(190, 14 + longest * 6.2), height = 40 + rows.length * 22;
  const f = frame({
    height, left, x: [0, 1], y: [0, rows.length], yTicks: false, xLabel: "AUROC",
    label: rows.map(({ group }) => `${group.defense} ${[before, final].map((key) => group.cells[key]?.text).filter(Boolean).join(" then ")}`).join("; "),
  });
  f.root.append(svg("line", { class: "reference", x1: f.sx(0.5), x2: f.sx(0.5), y1: f.top, y2: f.height - f.bottom }));
  rows.forEach(({ group, index }, place) => {
    const y = f.sy(rows.length - place - 0.5);
    const name = group.defense.length * 6.2 + 14 > left ? `${group.defense.slice(0, Math.floor((left - 14) / 6.2) - 1)}…` : group.defense;
    f.root.append(
      svg("line", { class: "axis", x1: f.left, x2: f.width - f.right, y1: y, y2: y }),
      svg("a", { href: target(index) }, svg("text", { x: f.left - 6, y: y + 4, "text-anchor": "end" }, name, svg("title", {}, group.defense))));
    for (const [key, filled] of [[before, false], [final, true]]) {
      const value = group.cells[key];
      if (!value) continue;
      const at = (share) => f.sx(Math.min(1, Math.max(0, share)));
      const dy = group.cells[before] && group.cells[final] ? (filled ? 4 : -4) : 0;
      if (value.half !== null) f.root.append(svg("line", { class: "acc stroke", x1: at(value.mean - value.half), x2: at(value.mean + value.half), y1: y + dy, y2: y + dy }));
      f.root.append(svg("circle", { class: filled ? "acc fill stroke" : "acc hollow stroke", cx: at(value.mean), cy: y + dy, r: 4 },
        svg("title", {}, `${measures[key].name}: ${value.text}, n = ${value.n}`)));
    }
  });
  return f.root;
}
