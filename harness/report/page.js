// Everything on the page from the data in it. Text from records only ever becomes text nodes and attribute values.

const { look, referenceLook, domainOf, draw, number, night, DASHES } = window.charts;
const data = JSON.parse(document.getElementById("data").textContent);
const { runs, comparisons, shared } = data;
const KINDS = [["bits", "Against bits"], ["latency", "Against latency"], ["memory", "Against memory"], ["compression", "Against the cost of compressing"]];
const MOST_DRAWN = 1500; // points of one plot; the non-dominated ones are always drawn
const MOST_TAGS = 40; // points of one plot that carry their bits
const MARKS = 12; // points of a learning curve that can be hovered
const WIDTHS = [1, 2, 3, 4, 6, 8, 12, 16, 32]; // ticks of an axis of bits
const ROWS = 100; // of a table at a time

const byId = (id) => document.getElementById(id);

/** An element: attributes, listeners (on…), children that are nodes or text. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

const list = (host, texts) => host.replaceChildren(...texts.map((text) => element("li", {}, text)));
const options = (select, texts) => select.replaceChildren(...texts.map((text, k) => element("option", { value: k }, text)));
const distinct = (values) => [...new Set(values)];

function groupBy(values, key) {
  const groups = new Map();
  for (const value of values) {
    const name = key(value);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(value);
  }
  return groups;
}

// ------------------------------------------------------------------------------------------------ numbers of a run

const placesOf = new Map();
/** Where a text stands in `shared`. */
function placeOf(text) {
  if (!placesOf.size) shared.forEach((value, k) => typeof value === "string" && placesOf.set(value, k));
  return placesOf.get(text);
}

/** A run's value on an axis as drawn: { value, low, high }, or null. */
function on(run, axis) {
  const metric = placeOf(axis.metric), workload = placeOf(axis.on);
  const found = run.measurements.find((m) => m[0] === metric && (axis.on === "" || m[1] === workload));
  if (!found || found[2] === null) return run.dense && axis.dense !== null ? { value: axis.dense, low: axis.dense, high: axis.dense } : null;
  const [value, ...ends] = [found[2], found[5] ?? found[2], found[6] ?? found[2]].map((n) => axis.factor * n + axis.offset);
  return { value, low: Math.min(...ends), high: Math.max(...ends) };
}

const titleOf = (axis) => `${axis.label}, ${axis.unit}`;
const longTitleOf = (axis) => axis.on ? `${titleOf(axis)} — ${axis.on}` : titleOf(axis);
const withInterval = ({ value, low, high }) => high > low ? `${number(value)} [${number(low)} to ${number(high)}]` : number(value);
const named = (run) => run.bits || run.sparsity ? `${run.label}, ${[run.bits && `${run.bits}${/^\d/.test(run.bits) ? " bits" : ""}`,
  run.sparsity && `sparsity ${run.sparsity}`].filter(Boolean).join(", ")}` : run.label;

/** Settings of the method as "key value", flat; what the code is called is left out. */
function settings(run) {
  const flat = (value, prefix) => value !== null && typeof value === "object"
    ? Object.entries(value).flatMap(([key, item]) => key === "_target_" ? [] : flat(item, prefix ? `${prefix}.${key}` : key))
    : value === null ? [] : [`${prefix}=${value}`];
  return flat(shared[run.config.method] ?? {}, "");
}

for (const comparison of comparisons) {
  comparison.table.rows.forEach((cells, k) => {
    const run = runs[comparison.first + k];
    run.place = comparison.first + k;
    run.label = cells[0]?.[0] ?? run.title;
  });
}

// ------------------------------------------------------------------------------------------------ what a point tells

const tip = byId("tip");

function tell(datum, box) {
  const run = runs[datum.run];
  const config = run ? settings(run) : [];
  tip.replaceChildren(
    element("p", {}, element("strong", {}, run ? named(run) : datum.name)),
    ...datum.lines.map((line) => element("p", {}, line)),
    ...(run ? [element("p", {}, [run.family, ...config.slice(0, 8), config.length > 8 && `… ${config.length - 8} more`].filter(Boolean).join(" · "))] : []),
    ...(run?.command ? [element("code", {}, run.command)] : []),
  );
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(box.right + 10, innerWidth - width - 8))}px`;
  tip.style.top = `${box.bottom + 12 + height < innerHeight ? box.bottom + 12 : Math.max(8, box.top - height - 12)}px`;
}

const hush = () => { tip.hidden = true; };
const hooks = { tell, hush, open: (datum) => runs[datum.run] && openRun(runs[datum.run]) };

function openRun(run) {
  hush();
  const facts = [["Family", run.family], ["Status", run.failed ? `failed in ${run.failed[0]}: ${run.failed[1]}` : run.collapsed ? "finished, collapsed" : "finished"],
    ["Record", `${run.folder ? `${run.folder}/` : ""}records, ${run.id}`], ["Compared with", run.baseline], ["Artifact", run.artifact && `sha256 ${run.artifact}`],
    ["Ran", [run.started, run.finished].filter(Boolean).join(" to ")], ["Paper", run.paper]].filter(([, text]) => text);
  const sections = (title, places) => element("details", {}, element("summary", {}, title),
    ...Object.entries(places).map(([name, place]) => [element("h4", {}, name), element("pre", {}, JSON.stringify(shared[place], null, 2))]).flat());
  const commands = [["The command that made it", run.command], ["This run alone", run.alone !== run.command && run.alone], ["Everything behind it, layer by layer", showCommand(run)]].filter(([, text]) => text).flatMap(([title, text]) => {
    const code = element("code", {}, text);
    return [element("h3", {}, title), element("pre", {}, code), element("button", { type: "button", onclick: () => copy(code) }, "Copy")];
  });
  byId("run").querySelector("div").replaceChildren(
    element("h2", { id: "run-title" }, named(run)),
    element("dl", {}, ...facts.flatMap(([term, text]) => [element("dt", {}, term), element("dd", {}, text)])),
    ...commands,
    element("details", { open: true }, element("summary", {}, "Measurements"), plainTable("Measurements of this run", ["metric", "value", "95 % interval", "unit", "protocol and workload", "note"],
      run.measurements.map(([metric, workload, value, unit, note, low, high]) => [shared[metric], value === null ? "–" : number(value),
        high === undefined ? "" : `${number(low)} to ${number(high)}`, shared[unit], shared[workload], shared[note]]), [1, 2])),
    sections("Configuration", run.config), sections("Environment", run.environment));
  byId("run").showModal();
}

/** The command that explains a run: its id, and where its records are if not in the usual place. */
function showCommand(run) {
  const where = run.folder ? `${data.results || "results"}/${run.folder}` : data.results;
  const quoted = /^[\w./-]*$/.test(where) ? where : `'${where.replaceAll("'", "'\\''")}'`;
  return ["python -m harness.show", run.id, where && `paths.results=${quoted}`].filter(Boolean).join(" ");
}

async function copy(node) {
  try {
    await navigator.clipboard.writeText(node.textContent);
    byId("said").textContent = "Copied.";
  } catch { // a browser that forbids it: the text is selected, to be copied by hand
    getSelection().selectAllChildren(node);
    byId("said").textContent = "Selected: copy it with your keyboard.";
  }
}

// ------------------------------------------------------------------------------------------------ plots

const waiting = new Map();
const drawn = new Map();
const seen = new IntersectionObserver((entries) => entries.forEach((entry) => entry.isIntersecting && render(entry.target)), { rootMargin: "500px" });

async function render(host) {
  const plot = waiting.get(host);
  if (!plot) return;
  waiting.delete(host);
  seen.unobserve(host);
  drawn.set(host, plot);
  await draw(host, plot());
  host.dataset.drawn = "1";
}

/** Draw again whatever is on the page: after a change of width or of colours. */
function redraw() {
  for (const host of drawn.keys()) if (!host.isConnected) drawn.delete(host);
  for (const [host, plot] of drawn) draw(host, plot());
  document.querySelectorAll("[data-refresh]").forEach((host) => host.refresh?.());
}

/** A plot that is drawn once it comes near the screen. make() gives the plot; it is asked again for every drawing. */
function later(make) {
  const host = element("div", { class: "plot" });
  waiting.set(host, make);
  seen.observe(host);
  return host;
}

/** One facet: its title, plot and legend. Series can be hidden by their names. */
function facet(title, names, plotWith, styleOf = (name, n) => look(n)) {
  const hidden = new Set();
  const styles = () => new Map(names.map((name, n) => [name, { name, ...styleOf(name, n) }]));
  let host = later(() => plotWith(styles(), hidden));
  const legend = element("ul", { class: "legend", "data-refresh": "" });
  legend.refresh = () => legend.replaceChildren(...names.map((name) => element("li", {}, element("button", {
    type: "button", "aria-pressed": String(!hidden.has(name)), title: "show or hide",
    onclick: () => {
      hidden.has(name) ? hidden.delete(name) : hidden.add(name);
      const place = names.indexOf(name);
      legend.refresh();
      legend.querySelectorAll("button")[place].focus();
      draw(host, plotWith(styles(), hidden));
    } }, symbol(styles().get(name)), name))));
  legend.refresh();
  return element("div", {}, element("h4", {}, title), host, legend);
}

function symbol({ colour, shape, dash }) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  for (const [name, value] of Object.entries({ width: dash ? 30 : 14, height: 14, viewBox: dash ? "-15 -7 30 14" : "-7 -7 14 14", "aria-hidden": true })) svg.setAttribute(name, value);
  if (dash) {
    const line = document.createElementNS(space, "path");
    for (const [name, value] of Object.entries({ d: "M-15,0H15", stroke: colour, "stroke-width": 2, "stroke-dasharray": dash })) line.setAttribute(name, value);
    svg.append(line);
  }
  const path = document.createElementNS(space, "path");
  for (const [name, value] of Object.entries({ d: shape, fill: colour, transform: "scale(4.5)" })) path.setAttribute(name, value);
  svg.append(path);
  return svg;
}

/** A figure: title, controls, caption, facets, and the same numbers as a table. */
function figure(title, controls, caption, facets, numbers) {
  const details = element("details", { ontoggle: () => details.open && !details.querySelector("table") && details.append(plainTable(title, ...numbers())) },
    element("summary", {}, "The numbers of this figure as a table"));
  const made = element("figure", {}, element("div", { class: "controls" }, element("h3", {}, title), ...controls),
    element("figcaption", {}, caption), element("div", { class: facets.length > 1 ? "facets" : "facets single" }, facets), details,
    element("button", { type: "button", class: "link", onclick: () => saveDrawings(title, made) }, "Save as SVG"));
  return made;
}

/** Let the browser save a text as a file. */
function save(name, type, text) {
  const anchor = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 1000);
}

const fileName = (...words) => words.join(" ").toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 80);

/** One SVG file for each plot of a figure, on the ground it was drawn for. */
async function saveDrawings(title, made) {
  for (const one of made.querySelectorAll(".facets > div")) {
    await render(one.querySelector(".plot"));
    const svg = one.querySelector("svg").cloneNode(true);
    svg.style.background = getComputedStyle(document.body).backgroundColor;
    save(`${fileName(title, one.querySelector("h4").textContent)}.svg`, "image/svg+xml", new XMLSerializer().serializeToString(svg));
  }
}

/** A cell of CSV that no spreadsheet takes for a formula. */
const csvCell = (text) => `"${(/^[=+@-]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;

function plainTable(caption, heads, rows, numeric = []) {
  const kind = (k) => ({ class: numeric.includes(k) ? "" : "words" });
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, element("table", {}, element("caption", {}, caption),
    element("thead", {}, element("tr", {}, heads.map((head, k) => element("th", { scope: "col", ...kind(k) }, head)))),
    element("tbody", {}, rows.map((row) => element("tr", {}, row.map((cell, k) => element("td", kind(k), cell)))))));
}

const members = (comparison) => runs.slice(comparison.first, comparison.first + comparison.count);
/** Families in print order, without the reference. */
const familiesOf = (some) => distinct(some.filter((run) => !run.dense).map((run) => run.family));
const shownIn = (some, family) => some.filter((run) => !run.dense && (family === null || run.family === family));

/** Points for a plot of a cost and a loss; runs without either are left out. */
function pointsOf(some, cost, loss, best) {
  return some.map((run) => [run, on(run, cost), on(run, loss)]).filter(([, x, y]) => x && y).map(([run, x, y]) => {
    const lines = [`${titleOf(loss)}: ${withInterval(y)}`, `${titleOf(cost)}: ${withInterval(x)}`];
    if (run.collapsed) lines.push("collapsed");
    if (best?.has(run.place)) lines.push("not dominated");
    return { run: run.place, x: x.value, xl: x.low, xh: x.high, y: y.value, yl: y.low, yh: y.high, hollow: best ? !best.has(run.place) : false,
      lines, says: `${named(run)}. ${lines.join(". ")}` };
  });
}

const endsOf = (points, kept = () => true) => (low, value, high) => points.filter(kept).flatMap((p) => [p[low], p[value], p[high]]);
const sound = (point) => !runs[point.run]?.collapsed;
function domains(points, x, y) {
  const steady = points.some(sound) ? sound : () => true;
  return [domainOf(endsOf(points)("xl", "x", "xh"), x), domainOf(endsOf(points, steady)("yl", "y", "yh"), y)];
}

/** An axis as it is drawn; bits have ticks at the widths that occur. */
function scaleOf(axis, domain) {
  const ticks = axis.kind === "bits" && { base: 2, values: WIDTHS.filter((width) => width >= domain[0] && width <= domain[1]) };
  return { title: titleOf(axis), scale: axis.scale, constant: axis.constant, domain, ...ticks };
}

/** At most MOST_DRAWN points: the filled ones, and of the rest every n-th. */
function thinned(points) {
  if (points.length <= MOST_DRAWN) return points;
  const rest = points.filter((p) => p.hollow), every = Math.ceil(rest.length / MOST_DRAWN);
  return [...points.filter((p) => !p.hollow), ...rest.filter((_, k) => k % every === 0)];
}

function staircase(points) {
  let least = Infinity;
  return points.filter((p) => !p.hollow).sort((a, b) => a.x - b.x || a.y - b.y).filter((p) => p.y < least && ((least = p.y), true));
}

function paretoFigure(comparison, kind, heading, lossPlace, chosen, together) {
  const costs = comparison.axes.map((axis, k) => [axis, k]).filter(([axis]) => axis.kind === kind);
  if (!costs.length) return null;
  const [cost, costPlace] = costs.find(([, k]) => k === chosen.get(kind)) ?? costs[0];
  const loss = comparison.axes[lossPlace];
  const front = comparison.fronts[`${lossPlace},${costPlace}`];
  const best = front && new Set(front);
  const all = members(comparison);
  const points = pointsOf(all, cost, loss, best);
  if (points.every((p) => runs[p.run].dense)) return null;
  const [xs, ys] = domains(points, cost, loss);
  const x = scaleOf(cost, xs), y = scaleOf(loss, ys);
  const dense = points.filter((p) => runs[p.run].dense);
  const families = together ? [null] : familiesOf(all).filter((family) => points.some((p) => runs[p.run].family === family && !runs[p.run].dense));
  const facets = families.map((family) => {
    const nameOf = (run) => together ? run.family : run.title;
    const own = thinned(points.filter((p) => !runs[p.run].dense && (together || runs[p.run].family === family)));
    own.forEach((p) => { p.tag = own.length <= MOST_TAGS ? runs[p.run].bits || runs[p.run].sparsity : ""; });
    const names = distinct(own.map((p) => nameOf(runs[p.run])));
    return facet(family ?? "All families", names, (styles, hidden) => ({
      ...hooks, x, y, height: together ? 380 : 250, front: front && staircase(points), references: dense.map((p) => p.y),
      description: `${family ?? "All families"}: ${titleOf(loss)} against ${titleOf(cost)}, ${own.length} runs`,
      series: [...[...styles.values()].filter((s) => !hidden.has(s.name)).map((s) => ({ ...s, points: own.filter((p) => nameOf(runs[p.run]) === s.name) })),
        { name: "Dense", ...referenceLook(), points: dense.map((p) => ({ ...p, hollow: false, tag: "dense" })) }] }));
  });
  const select = element("select", { onchange: () => { chosen.set(kind, Number(select.value)); redrawPareto(); byId("pareto-plots").querySelector(`[data-kind=${kind}] select`)?.focus(); } },
    ...costs.map(([axis, k]) => element("option", { value: k, selected: k === costPlace }, longTitleOf(axis))));
  const winners = points.filter((p) => !p.hollow).sort((a, b) => a.x - b.x).map((p) => named(runs[p.run]));
  const collapsed = points.filter((p) => runs[p.run].collapsed).length;
  const caption = [`${longTitleOf(loss)}, against ${longTitleOf(cost)}. ${points.length} runs with both.`,
    front ? `Not dominated, cheapest first: ${winners.slice(0, 12).join("; ")}${winners.length > 12 ? ` and ${winners.length - 12} more` : ""}.` : "Too many runs to seek the non-dominated ones of this pair.",
    collapsed ? `${collapsed} collapsed, outside the scale.` : "", points.length > MOST_DRAWN ? "Some dominated runs are not drawn." : ""].filter(Boolean).join(" ");
  const made = figure(heading, costs.length > 1 ? [element("label", {}, "Cost ", select)] : [], caption, facets, () => [
    ["run", "family", titleOf(loss), titleOf(cost), "not dominated"],
    points.map((p) => [named(runs[p.run]), runs[p.run].family, withInterval({ value: p.y, low: p.yl, high: p.yh }), withInterval({ value: p.x, low: p.xl, high: p.xh }), p.hollow ? "" : "yes"]), [2, 3]]);
  made.dataset.kind = kind;
  return made;
}

function degradationFigure(comparison, loss) {
  const cost = comparison.axes.find((axis) => axis.metric === "effective_bits_per_weight");
  if (!cost) return null;
  const all = members(comparison).filter((run) => run.dense || run.bits);
  const points = pointsOf(all, cost, loss);
  const own = points.filter((p) => !runs[p.run].dense);
  if (!own.length) return null;
  const [xs, ys] = domains(points, cost, loss);
  const x = scaleOf(cost, xs), y = scaleOf(loss, ys);
  own.forEach((p) => { p.tag = own.length <= 6 * MOST_TAGS ? runs[p.run].bits : ""; });
  const lineOf = (p) => [runs[p.run].label, runs[p.run].sparsity && `sparsity ${runs[p.run].sparsity}`].filter(Boolean).join(", ");
  const facets = familiesOf(all).filter((family) => own.some((p) => runs[p.run].family === family)).map((family) => {
    const mine = own.filter((p) => runs[p.run].family === family);
    return facet(family, distinct(mine.map(lineOf)), (styles, hidden) => ({
      ...hooks, x, y, references: points.filter((p) => runs[p.run].dense).map((p) => p.y),
      description: `${family}: ${titleOf(loss)} against effective bits, ${mine.length} runs`,
      series: [...styles.values()].filter((s) => !hidden.has(s.name)).map((s) => {
        const some = mine.filter((p) => lineOf(p) === s.name).sort((a, b) => a.x - b.x);
        return { ...s, points: some, path: some };
      }) }));
  });
  return figure("By method and bit-width", [], `${longTitleOf(loss)}, against ${longTitleOf(cost)}. ${own.length} runs. Horizontal line: dense.`, facets, () => [
    ["run", "family", titleOf(cost), titleOf(loss)],
    own.map((p) => [named(runs[p.run]), runs[p.run].family, number(p.x), withInterval({ value: p.y, low: p.yl, high: p.yh })]), [2, 3]]);
}

function latencyFigures(comparison, field, heading, label) {
  const all = members(comparison).filter((run) => run[field]);
  const workloads = distinct(all.flatMap((run) => run[field].map(([workload]) => workload)));
  return workloads.map((workload) => {
    const points = all.flatMap((run) => run[field].filter(([on]) => on === workload).map(([, size, value, low, high, least]) => ({
      run: run.place, x: size, y: value, yl: low, yh: high, least,
      lines: [`${label} ${size}: ${withInterval({ value, low, high })} ms per output token`, ...(least ? [`roofline: at least ${number(least)} ms, ${number(100 * least / value)} % of its speed reached`] : [])],
    }))).map((p) => ({ ...p, says: `${named(runs[p.run])}. ${p.lines.join(". ")}` }));
    const sizes = distinct(points.map((p) => p.x)).sort((a, b) => a - b);
    if (!points.length) return null;
    const x = { title: label === "batch" ? "batch, sequences" : "context, tokens", scale: "log", base: 2, values: sizes, domain: domainOf(sizes, { scale: "log" }) };
    const y = { title: "time per output token, ms", scale: "log", domain: domainOf(points.flatMap((p) => [p.yl, p.yh, p.least ?? p.y]), { scale: "log" }) };
    const dense = all.filter((run) => run.dense);
    const families = familiesOf(all);
    const facets = (families.length ? families : ["Dense"]).map((family) => {
      const some = [...dense, ...all.filter((run) => !run.dense && run.family === family)];
      const names = some.map(named);
      const styleOf = (name, n) => n < dense.length ? referenceLook() : look(n - dense.length);
      return facet(family, distinct(names), (styles, hidden) => ({
        ...hooks, x, y, description: `${family}: time per output token against ${label}, ${some.length} runs`,
        series: some.filter((run) => !hidden.has(named(run))).flatMap((run) => {
          const style = styles.get(named(run));
          const mine = points.filter((p) => p.run === run.place).sort((a, b) => a.x - b.x);
          return [{ ...style, points: mine, path: mine }, { ...style, points: [], dash: [3, 3], path: mine.filter((p) => p.least).map((p) => ({ x: p.x, y: p.least })) }];
        }) }), styleOf);
    });
    return figure(heading, [], `Time per output token, ms, ${label === "batch" ? "median" : "mean"} and 95 % interval of the median — ${workload}. Both axes are logarithmic.`, facets, () => [
      ["run", label, "ms per output token", "roofline, ms"], points.map((p) => [named(runs[p.run]), number(p.x), withInterval({ value: p.y, low: p.yl, high: p.yh }), p.least ? number(p.least) : ""]), [1, 2, 3]]);
  }).filter(Boolean);
}

const scaleFor = (values) => values.every((value) => value > 0) && Math.max(...values) > 20 * Math.min(...values) ? "log" : "linear";
const NUMBERS = /\d+/g;
/** Curves by name; those that differ in a number alone, as of layers, are one entry "… *". */
function curvesOf(comparison) {
  const names = distinct(members(comparison).flatMap((run) => Object.keys(run.curves ?? {})));
  const alike = [...groupBy(names, (name) => name.replace(NUMBERS, "*"))];
  return new Map(alike.map(([pattern, some]) => some.length > 1 ? [pattern, some] : [some[0], some]));
}

/** A plot of lines with points that can be hovered, faceted by family. lines: { run, name, path, points, dash }. */
function linesFigure(title, caption, lines, x, y, numbers) {
  const facets = familiesOf(lines.map(({ run }) => run)).map((family) => {
    const some = lines.filter(({ run }) => run.family === family);
    return facet(family, distinct(some.map(({ name }) => name)), (styles, hidden) => ({
      ...hooks, x, y, description: `${family}: ${title}, ${some.length} lines`,
      series: some.filter(({ name }) => !hidden.has(name)).map(({ name, path, points, dash }) => ({ ...styles.get(name), size: 30, dash, path, points })) }));
  });
  return figure(title, [], caption, facets, numbers);
}

function curveFigure(comparison, title, names) {
  const all = members(comparison).filter((run) => names.some((name) => run.curves?.[name]));
  const told = (run, p, what) => ({ ...p, run: run.place, lines: [what], says: `${named(run)}. ${what}` });
  if (names.length === 1) {
    const [name] = names;
    const pairs = all.flatMap((run) => run.curves[name]);
    const x = { title: "step", scale: "linear", domain: domainOf(pairs.map(([step]) => step), { scale: "linear" }) };
    const y = { title: name, scale: scaleFor(pairs.map(([, value]) => value)) };
    y.domain = domainOf(pairs.map(([, value]) => value), y);
    const lines = all.map((run) => {
      const path = run.curves[name].map(([step, value]) => ({ x: step, y: value }));
      const every = Math.ceil(path.length / MARKS);
      const points = path.filter((_, k) => k % every === 0 || k === path.length - 1).map((p) => told(run, p, `${name} at step ${p.x}: ${number(p.y)}`));
      return { run, name: named(run), path, points };
    });
    return linesFigure(name, `${name} by step, ${all.length} runs. What a loss is made of differs from method to method: courses compare, heights may not.`, lines, x, y, () => [["run", "first", "last", "steps"],
      all.map((run) => [named(run), number(run.curves[name][0][1]), number(run.curves[name].at(-1)[1]), number(run.curves[name].at(-1)[0])]), [1, 2, 3]]);
  }
  const ends = all.flatMap((run) => names.filter((name) => run.curves[name]).map((name) => ({ run, name, layer: Number(name.match(NUMBERS).at(-1)), first: run.curves[name][0][1], last: run.curves[name].at(-1)[1] })));
  const values = ends.flatMap(({ first, last }) => [first, last]);
  const x = { title: "number in the name", scale: "linear", domain: domainOf(ends.map(({ layer }) => layer), { scale: "linear" }) };
  const y = { title, scale: scaleFor(values) };
  y.domain = domainOf(values, y);
  const lines = all.flatMap((run) => [["first", [3, 3]], ["last", [1, 0]]].map(([which, dash]) => {
    const path = ends.filter((end) => end.run === run).map((end) => ({ x: end.layer, y: end[which], end })).sort((a, b) => a.x - b.x);
    return { run, name: named(run), dash, path, points: which === "first" ? [] : path.map((p) => told(run, p, `${p.end.name}: ${number(p.end.first)} at first, ${number(p.end.last)} at last`)) };
  }));
  return linesFigure(title, `${title}: the value at the last step, and dashed at the first, against the number that the * stands for. ${all.length} runs.`, lines, x, y, () => [
    ["run", "curve", "first", "last"], ends.map((end) => [named(end.run), end.name, number(end.first), number(end.last)]), [2, 3]]);
}

const LAYER = /^(.*?)\b(\d+)\.(.*)$/; // what stands before the number of the block, the number, the linear
const ALL_LINEARS = "mean of a block's linears";

/** Relative errors of a run's linears, see `packed` in data.py: [{ block, linear, value }]. */
function layerErrors(run, which) {
  const [names, ...codes] = run.layers;
  const bytes = Uint8Array.from(atob(codes[which]), (letter) => letter.charCodeAt(0));
  return shared[names].map((name, k) => {
    const code = bytes[2 * k] + 256 * bytes[2 * k + 1], [, , block, linear] = name.match(LAYER) ?? [null, "", k, name];
    return { block: Number(block), linear, value: code === 65535 ? NaN : code ? 10 ** (code / 1000 - 12) : 0 };
  }).filter(({ value }) => !Number.isNaN(value));
}

function layersFigure(comparison, which, linear) {
  const title = which ? "error of what a layer puts out" : "error of a layer's weights";
  const lines = members(comparison).filter((run) => run.layers).map((run) => {
    const blocks = groupBy(layerErrors(run, which).filter((error) => linear === ALL_LINEARS || error.linear === linear), ({ block }) => block);
    const path = [...blocks].sort(([a], [b]) => a - b).map(([block, errors]) => ({ x: block, y: errors.reduce((sum, { value }) => sum + value, 0) / errors.length }));
    return { run, name: named(run), path, points: path.map((p) => {
      const what = `block ${p.x}, ${linear}: ${title} ${number(p.y)}`;
      return { ...p, run: run.place, lines: [what], says: `${named(run)}. ${what}` };
    }) };
  }).filter(({ path }) => path.length);
  if (!lines.length) return null;
  const all = lines.flatMap(({ path }) => path);
  const x = { title: "decoder block", scale: "linear", domain: domainOf(all.map((p) => p.x), { scale: "linear" }) };
  const y = { title: "‖error‖² ÷ ‖original‖²", scale: "log", domain: domainOf(all.map((p) => p.y), { scale: "log" }) };
  return linesFigure(`${title}: ${linear}`, `Relative ${title}, ‖error‖² ÷ ‖original‖², by decoder block (${linear}), on a logarithmic axis; 0 is unchanged, 1 as wrong as zeros. ${lines.length} runs.`,
    lines, x, y, () => [["run", "least", "greatest", "in block"], lines.map(({ name, path }) => {
      const worst = path.reduce((a, b) => b.y > a.y ? b : a);
      return [name, number(Math.min(...path.map((p) => p.y))), number(worst.y), String(worst.x)];
    }), [1, 2, 3]]);
}

function scalingFigure(law) {
  const models = distinct(law.points.map((point) => point[1].slice(point[1].lastIndexOf(", ") + 2)));
  const points = law.points.map(([run, full, width, x, y, yl, yh, dense]) => {
    const name = models.length > 1 ? full : full.slice(0, full.lastIndexOf(", "));
    const lines = [`${law.metric}: ${withInterval({ value: y, low: yl, high: yh })}`, `${number(x / 8e6)} MB stored, ${number(width)} bits a weight`];
    return { run, name, width, x, xl: x, xh: x, y, yl, yh, dense, tag: dense ? "dense" : number(width), lines, says: `${full}. ${lines.join(". ")}` };
  }).sort((a, b) => a.x - b.x);
  const x = { title: "stored model, bits", scale: "log", format: "~s" }, y = { title: law.metric, scale: "log" };
  [x.domain, y.domain] = domains(points, x, y);
  const [kind, size] = [0, 1].map((k) => (name) => name.split(", blocks of ")[k] ?? "");
  const names = distinct(points.filter((p) => !p.dense).map((p) => p.name)).sort(compare);
  const [kinds, sizes] = [kind, size].map((part) => distinct(names.map(part)));
  const styleOf = (name) => ({ ...look(kinds.indexOf(kind(name))), dash: DASHES[sizes.indexOf(size(name)) % DASHES.length] });
  const one = facet(models.length > 1 ? "All models" : models[0], names, (styles, hidden) => ({
    ...hooks, x, y, height: 420, description: `${law.title}: ${points.length} runs`, references: points.filter((p) => p.dense).map((p) => p.y),
    series: [...[...styles.values()].filter((s) => !hidden.has(s.name)).map((s) => {
      const some = points.filter((p) => p.name === s.name);
      return { ...s, path: some, points: some };
    }), { name: "Dense", ...referenceLook(), points: points.filter((p) => p.dense) }] }), styleOf);
  return figure(law.metric, [], `${law.title}. One colour for each data type, one kind of line for each size of block.`, [one], () => [
    ["data type", "bits of a weight", "stored model, bits", law.metric],
    points.map((p) => [p.name, number(p.width), number(p.x), withInterval({ value: p.y, low: p.yl, high: p.yh })]), [1, 2, 3]]);
}

// ------------------------------------------------------------------------------------------------ tables

/** What a cell is sorted by: its text in a column of words, else its number ("W4A8": 4), where "failed" has none. */
const sortKey = (text, words) => {
  if (words || !text) return text || null;
  const found = /^W?(-?[\d,]+(\.\d+)?(e[+-]?\d+)?)(?!:)/i.exec(text);
  return found ? Number(found[1].replaceAll(",", "")) : null;
};
const compare = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });

/** A table that sorts by its heads and is filtered by words, by family, and by what collapsed.
 *  columns: { head, words, wide }; rows: { cells: [{ text, node }], run }; ofRuns: whether a row is a run. */
function sortable(host, caption, allColumns, allRows, ofRuns = true) {
  const used = allColumns.map((_, k) => k).filter((k) => k === 0 || allRows.some((row) => row.cells[k].text || row.cells[k].mark));
  const columns = used.map((k) => allColumns[k]);
  const rows = allRows.map((row) => ({ ...row, cells: used.map((k) => row.cells[k]) }));
  const state = { column: -1, down: false, shown: ROWS };
  const families = distinct(rows.map((row) => row.run?.family).filter(Boolean));
  const words = element("input", { type: "search", placeholder: "words in any column", autocomplete: "off" });
  const family = element("select", {}, element("option", { value: "" }, "all"), ...families.map((name) => element("option", { value: name }, name)));
  const sane = element("input", { type: "checkbox" });
  const count = element("span", { class: "soft", "aria-live": "polite" });
  const body = element("tbody");
  const more = element("button", { type: "button", onclick: () => { state.shown += ROWS; fill(); } }, "Show more rows");
  const heads = columns.map((column, k) => element("th", { scope: "col", class: column.words ? "words" : "" },
    element("button", { type: "button", onclick: () => { state.down = state.column === k && !state.down; state.column = k; fill(); } }, column.head)));
  rows.forEach((row) => { row.text = row.cells.map((cell) => cell.text).join(" ").toLowerCase(); });

  /** The rows that pass the filters, in the order that was chosen. */
  function kept() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const passing = rows.filter((row) => wanted.every((word) => row.text.includes(word)) && (!family.value || row.run?.family === family.value)
      && !(sane.checked && (row.run?.collapsed || row.run?.failed)));
    if (state.column < 0) return passing;
    const key = (row) => sortKey(row.cells[state.column].text, columns[state.column].words);
    const [full, blank] = [passing.filter((row) => key(row) !== null), passing.filter((row) => key(row) === null)];
    return [...full.sort((a, b) => (state.down ? -1 : 1) * compare(key(a), key(b))), ...blank];
  }

  function fill() {
    const some = kept();
    heads.forEach((head, k) => k === state.column ? head.setAttribute("aria-sort", state.down ? "descending" : "ascending") : head.removeAttribute("aria-sort"));
    heads.forEach((head, k) => { head.firstChild.textContent = columns[k].head + (k === state.column ? (state.down ? " ▼" : " ▲") : ""); });
    body.replaceChildren(...some.slice(0, state.shown).map((row) => element("tr", {}, row.cells.map((cell, k) => element(k ? "td" : "th",
      { class: [columns[k].words && "words", columns[k].wide && "wide"].filter(Boolean).join(" ") || undefined, scope: k ? undefined : "row" }, cell.node ? cell.node() : cell.text)))));
    count.textContent = `${Math.min(some.length, state.shown)} of ${rows.length} rows`;
    more.hidden = some.length <= state.shown;
  }

  for (const control of [words, family, sane]) control.addEventListener("input", () => { state.shown = ROWS; fill(); });
  const filters = [element("label", {}, "Filter ", words), ...(families.length > 1 ? [element("label", {}, "Family ", family)] : []),
    ...(ofRuns && rows.some((row) => row.run?.collapsed) ? [element("label", {}, sane, " without collapsed and failed runs")] : []), count,
    element("button", { type: "button", class: "link", onclick: () => save(`${fileName(caption)}.csv`, "text/csv",
      [columns.map(({ head }) => head), ...kept().map((row) => row.cells.map(({ text }) => text))].map((line) => line.map(csvCell).join(",")).join("\r\n")) }, "Save these rows as CSV")];
  host.replaceChildren(element("p", { class: "controls" }, ...filters),
    element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, element("table", {}, element("caption", { class: "unseen" }, caption),
      element("thead", {}, element("tr", {}, heads)), body)), more);
  fill();
}

const link = (run) => element("button", { type: "button", class: "link", onclick: () => openRun(run) }, run.label ?? run.title);

function resultsTable(comparison) {
  const { heads, arrows, words, rows, signs, notes } = comparison.table;
  const columns = heads.map((head, k) => ({ head: [head, arrows[k]].filter(Boolean).join(" "), words: words.includes(k) }));
  columns.splice(1, 0, { head: "Family", words: true });
  const cellOf = ([value = "", interval = "", sign = "", bold = 0, marks = []]) => ({ text: value, mark: sign, node: () => [
    bold ? element("strong", {}, value) : value, marks.length ? element("sup", {}, marks.join(", ")) : "", interval ? element("small", {}, ` ${interval}`) : "", sign ? ` ${sign}` : ""] });
  sortable(byId("results"), `Results: ${comparison.title}`, columns, rows.map((cells, k) => {
    const run = runs[comparison.first + k];
    const made = cells.map(cellOf);
    const [, , , , marks = []] = cells[0];
    made[0].node = () => [link(run), marks.length ? element("sup", {}, marks.join(", ")) : ""];
    made.splice(1, 0, { text: run.dense ? "" : run.family });
    return { cells: made, run };
  }));
  list(byId("signs"), [...signs, "[a–b]: 95 % interval"]);
  list(byId("notes"), notes);
  byId("notes").parentElement.hidden = !notes.length;
}

function failuresTable() {
  const none = placeOf("");
  const failed = runs.filter((run) => run.failed).map((run) => ({ run, cells: [{ text: run.label ?? run.title, node: () => link(run) }, { text: run.bits ?? "" }, { text: `run, ${run.failed[0]}` },
    { text: run.failed[1] }, { text: run.folder ?? "" }, { text: run.command ?? "", node: () => element("code", {}, run.command ?? "") }] }));
  const gaps = runs.flatMap((run) => run.measurements.filter((m) => m[2] === null && m[4] !== none).map((m) => ({ run, cells: [{ text: run.label ?? run.title, node: () => link(run) },
    { text: run.bits ?? "" }, { text: `${shared[m[0]]}, ${shared[m[1]]}` }, { text: shared[m[4]] }, { text: run.folder ?? "" }, { text: run.command ?? "", node: () => element("code", {}, run.command ?? "") }] })));
  const unread = data.broken.map((reason) => ({ cells: [{ text: "–" }, { text: "" }, { text: "file not read" }, { text: reason }, { text: "" }, { text: "" }] }));
  const rows = [...failed, ...gaps, ...unread];
  if (!rows.length) byId("failed").replaceChildren(element("p", {}, "None: every run finished and every number was measured."));
  else sortable(byId("failed"), "Failures and gaps", [{ head: "Run", words: true }, { head: "Bits" }, { head: "What", words: true, wide: true }, { head: "Reason", words: true, wide: true }, { head: "Folder", words: true },
    { head: "Command", words: true, wide: true }], rows, false);
}

function provenance(comparison) {
  byId("environments").replaceChildren(...comparison.environments.map(({ count, ...parts }) => element("details", {},
    element("summary", {}, `${count} runs: ${describeEnvironment(parts)}`), element("pre", {}, Object.entries(parts).map(([name, place]) => `${name}: ${JSON.stringify(shared[place], null, 1)}`).join("\n")))));
  sortable(byId("sources"), "Where each number comes from", [{ head: "Run", words: true }, { head: "Bits" }, { head: "Record", words: true }, { head: "Finished", words: true }, { head: "Commit", words: true },
    { head: "Command", words: true, wide: true }], members(comparison).map((run) => {
    const source = shared[run.environment.source] ?? {};
    return { run, cells: [{ text: run.label, node: () => link(run) }, { text: run.bits ?? "" }, { text: run.id }, { text: (run.finished ?? "").slice(0, 16).replace("T", " ") },
      { text: source.commit ? `${source.commit.slice(0, 8)}${source.dirty ? " with changes" : ""}` : "" }, { text: run.command ?? "", node: () => element("code", {}, run.command ?? "") }] };
  }));
}

function describeEnvironment({ machine, versions, source }) {
  const at = (place) => shared[place] ?? {};
  const gpus = at(machine).gpus ?? [];
  return [...distinct(gpus.map(String)), at(machine).processor, at(machine).cores && `${at(machine).cores} cores`,
    ...["python", "torch", "transformers"].filter((name) => at(versions)[name]).map((name) => `${name} ${at(versions)[name]}`),
    at(source).commit && `commit ${String(at(source).commit).slice(0, 8)}${at(source).dirty ? " with changes" : ""}`].filter(Boolean).join(", ");
}

// ------------------------------------------------------------------------------------------------ the page

const costs = new Map();
let current = null;

function put(section, figures) {
  byId(`${section}-plots`).replaceChildren(...figures.filter(Boolean));
  byId(section).hidden = !figures.some(Boolean);
}

function redrawPareto() {
  const loss = Number(byId("loss").value);
  put("pareto", KINDS.map(([kind, heading]) => paretoFigure(current, kind, heading, loss, costs, byId("together").checked)));
}

function redrawLoss() {
  redrawPareto();
  const loss = current.axes[Number(byId("loss").value)];
  put("degradation", [loss && degradationFigure(current, loss)]);
}

function redrawCurve() {
  const title = byId("curve").value;
  const names = curvesOf(current).get(title);
  put("curves", [names && curveFigure(current, title, names)]);
}

function redrawLayers() {
  put("layers", [layersFigure(current, Number(byId("error").value), byId("linear").selectedOptions[0].textContent)]);
}

function choose(place) {
  current = comparisons[place];
  costs.clear();
  list(byId("protocol"), current.protocol);
  const losses = current.axes.map((axis, k) => [axis, k]).filter(([axis]) => axis.kind === "loss");
  byId("loss").replaceChildren(...losses.map(([axis, k]) => element("option", { value: k }, longTitleOf(axis))));
  if (losses.length) redrawLoss();
  else put("pareto", []), put("degradation", []);
  put("latency", [...latencyFigures(current, "batches", "Against batch", "batch"), ...latencyFigures(current, "contexts", "Against context", "context")]);
  const having = (names) => members(current).filter((run) => names.some((name) => run.curves?.[name])).length;
  const names = [...curvesOf(current)].sort(([a, some], [b, others]) => b.includes("loss") - a.includes("loss") || some.length - others.length || having(others) - having(some));
  byId("curve").replaceChildren(...names.map(([name, some]) => element("option", { value: name }, `${name} (${having(some)} runs)`)));
  redrawCurve();
  const linears = distinct(members(current).filter((run) => run.layers).flatMap((run) => layerErrors(run, 0).map(({ linear }) => linear)));
  options(byId("linear"), [ALL_LINEARS, ...linears]);
  redrawLayers();
  resultsTable(current);
  provenance(current);
  navigation();
}

function navigation() {
  document.querySelector("nav").replaceChildren(...[...document.querySelectorAll("main > section")].filter((section) => !section.hidden)
    .map((section) => element("a", { href: `#${section.id}` }, section.querySelector("h2").textContent.split(":")[0])));
}

function start() {
  const folders = groupBy(comparisons.map((comparison, k) => ({ ...comparison, k })), (comparison) => comparison.folder);
  byId("comparison").replaceChildren(...[...folders].map(([folder, some]) => element("optgroup", { label: folder || "records" },
    some.map((comparison) => element("option", { value: comparison.k }, [comparison.title, comparison.apart, `${comparison.count} runs`].filter(Boolean).join(" · "))))));
  const largest = comparisons.reduce((best, comparison, k) => comparison.count > (comparisons[best]?.count ?? 0) ? k : best, 0);
  byId("comparison").value = largest;
  byId("comparison").addEventListener("change", (event) => choose(Number(event.target.value)));
  byId("loss").addEventListener("change", redrawLoss);
  byId("together").addEventListener("change", redrawPareto);
  byId("curve").addEventListener("change", redrawCurve);
  byId("error").addEventListener("change", redrawLayers);
  byId("linear").addEventListener("change", redrawLayers);
  options(byId("law"), data.scaling.map((law) => [law.folder, law.title].filter(Boolean).join(": ")));
  byId("law").value = data.scaling.reduce((best, law, k) => law.points.length > (data.scaling[best]?.points.length ?? 0) ? k : best, 0);
  const drawLaw = () => put("scaling", [data.scaling.length && scalingFigure(data.scaling[Number(byId("law").value)])]);
  byId("law").addEventListener("change", drawLaw);
  drawLaw();
  failuresTable();
  if (comparisons.length) choose(largest);
  else document.querySelectorAll("main > section:not(#failures)").forEach((section) => { section.hidden = true; });
  night.addEventListener("change", redraw);
  let width = innerWidth, timer;
  addEventListener("resize", () => { if (innerWidth === width) return; width = innerWidth; clearTimeout(timer); timer = setTimeout(redraw, 150); });
  addEventListener("scroll", hush, { passive: true });
  addEventListener("beforeprint", () => [...waiting.keys()].forEach(render));
}

start();
requestAnimationFrame(() => requestAnimationFrame(() => { document.body.dataset.ready = "1"; }));
