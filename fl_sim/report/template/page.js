"use strict";
// The page: what is chosen, and what is shown of it.

const data = JSON.parse(document.getElementById("data").textContent);
const groups = data.groups;
const measures = Object.fromEntries(data.measures.map((measure) => [measure.key, measure]));
const ABSENT = "–";
const hidden = Object.fromEntries(Object.keys(data.varied).map((key) => [key, new Set()]));
const chosen = {
  heat: ["asr_late", "asr", "acc"].find((key) => measures[key]),
  cost: ["erasing_seconds", "seconds"].find((key) => measures[key]),
  effect: ["asr_late", "asr", "acc"].find((key) => measures[key]),
  sort: null,
};

const visible = () => groups
  .map((group, index) => ({ group, index }))
  .filter(({ group }) => Object.entries(hidden).every(([key, values]) => !values.has(group.varied[key] ?? ABSENT)));

function bySetting(list) {
  const found = new Map();
  for (const each of list) {
    const key = `${each.group.kind}\n${each.group.setting}`;
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(each);
  }
  return [...found.values()];
}

function header() {
  const filters = Object.entries(data.varied).filter(([, values]) => values.length > 1).map(([key, values]) =>
    make("fieldset", {}, make("legend", {}, key), make("div", { class: "values" }, values.map((value) =>
      make("label", {}, make("input", {
        type: "checkbox", checked: true, "data-key": key,
        onchange: (event) => { hidden[key][event.target.checked ? "delete" : "add"](value); render(); },
      }), ` ${value}`)))));
  const reset = make("button", {
    type: "button",
    onclick: () => {
      for (const values of Object.values(hidden)) values.clear();
      for (const box of document.querySelectorAll(".filters input")) box.checked = true;
      render();
    },
  }, "Show all");
  document.getElementById("top").replaceChildren(
    make("h1", {}, data.title), make("p", {}, data.overview), make("p", { class: "muted small" }, data.made),
    filters.length ? make("div", { class: "filters", role: "group", "aria-label": "Filters" }, filters, reset) : "",
    make("p", { class: "note", id: "count", "aria-live": "polite" }),
    make("nav", { "aria-label": "Sections" }, make("ul", { id: "sections" })));
}

function choice(label, key, keys) {
  return make("label", {}, `${label} `, make("select", { onchange: (event) => { chosen[key] = event.target.value; render(); } },
    keys.map((each) => make("option", { value: each, selected: chosen[key] === each }, measures[each].name))), " ");
}

// A number keeps its interval, and n and p their values, on one line.
const kept = (text) => text.replace(/ (±|=|<) /g, "\u00a0$1\u00a0");

function sentences(list) {
  return bySetting(list).map((own) => [
    make("h3", {}, own[0].group.setting),
    make("p", {}, kept(data.settings[`${own[0].group.kind}\n${own[0].group.setting}`])),
    make("details", { open: list.length <= 12 }, make("summary", {}, "Each defense"), make("ul", { class: "sentences" }, own.map(({ group, index }) =>
      make("li", {}, make("a", { href: target(index) }, group.defense), ": ", kept(group.sentence))))),
  ]);
}

function numbers(list) {
  const columns = data.measures.filter((measure) => list.some(({ group }) => group.cells[measure.key]));
  const heading = (measure) => {
    const sorted = chosen.sort?.key === measure.key ? (chosen.sort.down ? " ▾" : " ▴") : "";
    const sort = () => {
      const down = chosen.sort?.key === measure.key ? !chosen.sort.down : measure.better > 0;
      chosen.sort = { key: measure.key, down };
      render();
    };
    return make("th", { class: "number", scope: "col", title: measure.about }, make("button", { type: "button", onclick: sort }, measure.name + sorted));
  };
  const row = ({ group, index }, flat) => make("tr", {},
    flat ? make("td", {}, group.setting) : null,
    make("td", {}, make("a", { href: target(index) }, group.defense)), make("td", { class: "number" }, group.seeds),
    columns.map((measure) => {
      const value = group.cells[measure.key];
      return make("td", { class: "number" }, value ? make("a", { href: target(index), title: `n = ${value.n}` }, value.text.replace(" ± ", " ±\u00a0")) : ABSENT);
    }));
  const flat = chosen.sort !== null;
  const head = make("tr", {}, flat ? make("th", {}, "setting") : null, make("th", {}, "defense"), make("th", { class: "number" }, "n"), columns.map(heading));
  let body;
  if (flat) {
    const value = ({ group }) => group.cells[chosen.sort.key]?.mean ?? (chosen.sort.down ? -Infinity : Infinity);
    body = [...list].sort((a, b) => (chosen.sort.down ? value(b) - value(a) : value(a) - value(b))).map((each) => row(each, true));
  } else {
    body = bySetting(list).map((own) => [
      make("tr", { class: "setting" }, make("td", { colspan: columns.length + 2 }, own[0].group.setting)),
      own.map((each) => row(each, false)),
    ]);
  }
  return [
    make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, body.flat(2)))),
    make("p", { class: "note" }, data.note, " A number leads to its runs. A heading sorts."),
  ];
}

function key() {
  const swatch = (name, attributes) => make("span", {}, svg("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" }, svg("line", { x1: 1, x2: 25, y1: 6, y2: 6, ...attributes })), name);
  return make("div", { class: "key" },
    swatch("ASR, mean and 95 % interval", { class: "asr line" }), swatch("ACC", { class: "acc line" }),
    swatch("ASR without a defense", { class: "reference" }), swatch("erasing (×: refused)", { class: "erasing" }));
}

function compared(list) {
  const seen = new Set(list.map(({ index }) => index));
  const rows = data.comparisons.filter((each) => seen.has(each.group));
  if (!rows.length) return null;
  const headings = data.comparison_headings;
  return [
    make("p", { class: "note" }, data.method),
    make("div", { class: "scroll" }, make("table", {},
      make("thead", {}, make("tr", {}, ["setting", "defense", ...headings].map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, rows.map((each) => make("tr", {},
        make("td", {}, groups[each.group].setting),
        make("td", {}, make("a", { href: target(each.group) }, groups[each.group].defense)),
        each.cells.map((cell, place) => {
          if (place === 0) return make("td", {}, make("a", { href: target(each.control) }, cell));
          const verdict = place === each.cells.length - 1;
          return make("td", { class: verdict ? each.verdict : place > 1 ? "number" : "" }, verdict || place === 1 ? cell : make("a", { href: target(each.group) }, cell));
        })))))),
  ];
}

function refused(list) {
  const seen = new Set(list.map(({ index }) => index));
  const rows = data.refusals.filter((each) => seen.has(each.group));
  if (!rows.length) return null;
  const noted = rows.filter((each) => each.notes.length);
  const name = (each) => make("a", { href: target(each.group) }, groups[each.group].defense);
  return [
    make("p", { class: "note" }, data.refused_note),
    make("div", { class: "scroll" }, make("table", {},
      make("thead", {}, make("tr", {}, ["setting", "defense", ...data.refused_headings].map((head) => make("th", { scope: "col" }, head)))),
      make("tbody", {}, rows.map((each) => make("tr", {}, make("td", {}, groups[each.group].setting), make("td", {}, name(each)),
        each.cells.map((cell, place) => make("td", { class: place === 2 ? "" : "number" }, cell))))))),
    noted.length ? make("details", {}, make("summary", {}, "What was refused or failed, and why"), noted.map((each) => [
      make("p", {}, `${groups[each.group].setting}: `, name(each)),
      make("ul", { class: "sentences small" }, each.notes.map((line) => make("li", {}, line)))])) : null,
  ];
}

function settings(content) {
  return make("pre", {}, Object.entries(content).map(([name, value]) => `${name}: ${value}`).join("\n"));
}

function runs(list) {
  const columns = data.measures;
  return [
    list.map(({ group, index }) => {
      const used = columns.filter((measure) => group.cases.some((each) => measure.key in each.numbers));
      const box = make("details", { id: `g${index}` }, make("summary", {}, `${group.setting}: ${group.defense} (n = ${group.seeds})`));
      box.addEventListener("toggle", () => {
        if (!box.open || box.dataset.made) return;
        box.dataset.made = "yes";
        fill(box, {}, [make("p", {}, group.sentence),
          make("div", { class: "scroll" }, make("table", {},
            make("thead", {}, make("tr", {}, make("th", {}, "seed"), used.map((measure) => make("th", { class: "number", title: measure.about }, measure.name)), make("th", {}, "state"), make("th", {}, "folder"))),
            make("tbody", {}, group.cases.map((each) => make("tr", {}, make("td", {}, each.seed),
              used.map((measure) => make("td", { class: "number" }, shown(each.numbers[measure.key], measure.digits))),
              make("td", {}, data.runs[each.run].state), make("td", {}, make("code", {}, data.runs[each.run].folder))))))),
          group.cases.map((each) => {
            const run = data.runs[each.run];
            return make("details", {}, make("summary", {}, `seed ${each.seed}: command and configuration`),
              make("pre", {}, run.command || "the folder does not say by which command it was made"),
              make("p", { class: "small" }, "What its configuration does not share with all other runs:"), settings(run.config),
              make("p", { class: "small" }, "What it shares:"), settings(data.common));
          })]);
      });
      return box;
    }),
  ];
}

function section(id, title, content) {
  if (content === null || (Array.isArray(content) && !content.flat(3).some(Boolean))) return null;
  return make("section", { id }, make("h2", {}, title), content);
}

function render() {
  const list = visible();
  const has = (name) => list.some(({ group }) => group.cells[name]);
  const known = (keys) => keys.filter((name) => measures[name]);
  const attacked = list.filter(({ group }) => group.attacked);
  const grid = (content) => { const made = content.filter(Boolean); return made.length ? make("div", { class: "grid" }, made) : null; };
  const facets = (draw, own = attacked) => grid(bySetting(own).map((own) => {
    const chart = draw(own);
    return chart && make("figure", {}, make("h4", {}, own[0].group.setting), chart);
  }));
  const after = durabilities(list);
  const cost = chosen.cost && facets((own) => scatter(own, measures[chosen.cost], measures[chosen.effect], { missing: chosen.cost === "erasing_seconds" ? 0 : null }));
  const rates = has("tpr") && has("fpr") ? facets((own) => scatter(own, measures.fpr, measures.tpr, { xRange: [0, 1] })) : null;
  const screened = Object.entries(data.detectors).map(([name, keys]) => [name, facets((own) => dots(own, keys), list)]).filter(([, made]) => made);
  const sections = [
    section("findings", "Findings", sentences(list)),
    section("numbers", "Numbers", numbers(list)),
    section("heat", "Settings by defenses", chosen.heat ? [
      make("p", { class: "controls" }, choice("Show", "heat", data.measures.map((measure) => measure.key).filter(has))),
      make("p", { class: "note" }, `${measures[chosen.heat].name}: ${measures[chosen.heat].about}. The darker, the higher.`),
      heatMap(list, measures[chosen.heat])] : null),
    section("curves", "Curves", [key(), bySetting(list).map((own) => {
      const drawn = grid(own.map(({ group, index }) => curves(group, index, groups)));
      return drawn && [make("h3", {}, own[0].group.setting), drawn];
    })]),
    section("cost", "Cost against effect", cost ? [
      make("p", { class: "controls" }, choice("Cost", "cost", known(["erasing_seconds", "seconds"])), choice("Effect", "effect", known(["asr_late", "asr", "acc_late", "acc"]))),
      make("p", { class: "note" }, `${measures[chosen.cost].about}; ${measures[chosen.effect].about}. Bars: 95 % intervals. Seconds are those of the machine that ran it, with whatever else it did.`), cost] : null),
    section("durability", "After an erasing", after.length ? [
      make("p", { class: "note" }, "ASR by rounds since an accepted erasing, up to the next one: each seed's mean over its erasings, then mean and 95 % interval over seeds."), grid(after)] : null),
    section("detection", "Who was rejected", rates ? [
      make("p", { class: "note" }, "Top left is right: all attackers' updates rejected (TPR 1), no honest one (FPR 0)."), rates] : null),
    section("screened", "Detectors of stamped images", screened.length ? [
      make("p", { class: "note" }, "AUROC with 95 % intervals: how well a detector tells stamped test images from clean ones; 1 always, 0.5 (dashed) by chance. ",
        "Filled: on the final model; hollow: on the model that the last erasing found, whose backdoor it was to find."),
      screened.map(([name, made]) => [make("h3", {}, name), made])] : null),
    section("refused", "Refused and failed", refused(list)),
    section("tests", "Comparisons", compared(list)),
    section("runs", "Runs", runs(list)),
    section("left", "Left out", data.left_out.length ? make("ul", {}, data.left_out.map((line) => make("li", {}, line))) : null),
  ].filter(Boolean);
  document.getElementById("main").replaceChildren(...(list.length ? sections : [make("p", {}, "Nothing is left by the filters.")]));
  document.getElementById("sections").replaceChildren(...sections.map((each) =>
    make("li", {}, make("a", { href: `#${each.id}` }, each.querySelector("h2").textContent))));
  document.getElementById("count").textContent = list.length < groups.length ? `${list.length} of ${groups.length} configurations are shown.` : "";
}

// A link to runs opens them.
function reveal() {
  const name = decodeURIComponent(location.hash.slice(1));
  const found = name && document.getElementById(name);
  if (!found) return;
  if (found.tagName === "DETAILS") found.open = true;
  found.scrollIntoView();
}

header();
render();
addEventListener("hashchange", reveal);
addEventListener("beforeprint", () => document.querySelectorAll("#findings details").forEach((each) => { each.open = true; }));
document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href^='#'], a");
  if (link && link.getAttribute("href") === location.hash) reveal();
});
reveal();
