// One kind of plot for all sections: series of points with intervals, lines, reference lines, in Vega-Lite.
// Points can be hovered and focused; who draws says what a point tells and what opening it does.

const LIGHT = { text: "#1b1f24", soft: "#57606a", line: "#d0d7de", front: "#8c959f",
  colours: ["#0072b2", "#d55e00", "#00795a", "#b8448f", "#7a6300", "#2f8fcb", "#8b2a1f"] };
const DARK = { text: "#e6e9ec", soft: "#a3adb8", line: "#3a424b", front: "#7d8791",
  colours: ["#56b4e9", "#ff9a4d", "#2fc79a", "#ee8fc6", "#f0e442", "#9db4ff", "#ff8a7a"] };
// Vega draws a path within [-1, 1]
const SHAPES = ["M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z", "M-.9,-.9H.9V.9H-.9Z", "M0,-1.15L1.1,.85H-1.1Z",
  "M0,-1.25L1.15,0L0,1.25L-1.15,0Z", "M-.4,-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z", "M0,1.15L1.1,-.85H-1.1Z"];
const STAR = "M0,-1.5L.4,-.45L1.45,-.45L.6,.2L.9,1.25L0,.6L-.9,1.25L-.6,.2L-1.45,-.45L-.4,-.45Z";
const DASHES = [[1, 0], [6, 3], [2, 3], [8, 3, 2, 3]];
const night = matchMedia("(prefers-color-scheme: dark)");

/** A colour and a shape for the n-th series: pairs repeat after 42. Looks differ in both, for eyes that mix colours. */
const look = (n) => ({ colour: (night.matches ? DARK : LIGHT).colours[n % 7], shape: SHAPES[n % 6] });
const referenceLook = () => ({ colour: (night.matches ? DARK : LIGHT).text, shape: STAR });

/** Where a value lies on a scale, up to a linear map. */
const along = (value, { scale, constant = 1 }) =>
  scale === "log" ? Math.log(value) : scale === "symlog" ? Math.sign(value) * Math.log1p(Math.abs(value) / constant) : value;
const back = (place, { scale, constant = 1 }) =>
  scale === "log" ? Math.exp(place) : scale === "symlog" ? Math.sign(place) * Math.expm1(Math.abs(place)) * constant : place;

/** From the least to the greatest of `ends`, with room beside them; on a logarithmic scale zero and less count for nothing. */
function domainOf(ends, one) {
  const found = ends.filter((value) => Number.isFinite(value) && (one.scale !== "log" || value > 0)).map((value) => along(value, one));
  if (!found.length) return one.scale === "log" ? [0.1, 10] : [0, 1];
  const low = found.reduce((a, b) => Math.min(a, b)), high = found.reduce((a, b) => Math.max(a, b));
  const room = (high - low || (one.scale === "linear" && Math.abs(high)) || 1) * 0.06;
  return [back(low - room, one), back(high + room, one)];
}

/** Ticks at 1 and 3 of each power of ten, and zero: Vega's own on a symlog scale crowd at its upper end. */
function symlogTicks([low, high], constant) {
  const first = Math.floor(Math.log10(constant));
  const sizes = Array.from({ length: 16 }, (_, k) => (k % 2 ? 3 : 1) * 10 ** (first + Math.floor(k / 2))).filter((size) => size >= constant);
  const few = Math.log10(Math.max(high, -low) / constant) > 3.5 ? sizes.filter((size) => Math.abs(Math.log10(size) % 1) < 1e-9) : sizes;
  return [...few.map((size) => -size).reverse(), 0, ...few].filter((tick) => tick >= low && tick <= high).map((tick) => Number(tick.toPrecision(2)));
}

const clamp = (value, [low, high]) => Math.min(high, Math.max(low, value));
const [FOUR, THREE, COMPACT] = [{ maximumSignificantDigits: 4 }, { maximumSignificantDigits: 3 }, { maximumSignificantDigits: 3, notation: "compact" }]
  .map((digits) => new Intl.NumberFormat("en", digits));
const number = (value) => Number.isFinite(value) ? FOUR.format(value) : "–";
const short = (value) => (Math.abs(value) < 1e4 ? THREE : COMPACT).format(value);

/** The rows that Vega draws: within the domain, with an arrow and the number where a value lies outside. */
function rowsOf({ x, y, series }) {
  return series.flatMap((one) => one.points.map((point) => {
    const out = point.y > y.domain[1] ? "↑" : point.y < y.domain[0] ? "↓" : "";
    const aside = point.x > x.domain[1] ? "→" : "";
    return { ...point, x: clamp(point.x, x.domain), y: clamp(point.y, y.domain),
      xl: clamp(point.xl ?? point.x, x.domain), xh: clamp(point.xh ?? point.x, x.domain),
      yl: clamp(point.yl ?? point.y, y.domain), yh: clamp(point.yh ?? point.y, y.domain),
      colour: one.colour, shape: one.shape, fill: point.hollow ? 0 : 1, size: one.shape === STAR ? 110 : one.size ?? 62,
      tag: [point.tag, out && `${out}${short(point.y)}`, aside && `${aside}${short(point.x)}`].filter(Boolean).join(" ") };
  }));
}

const TAG_PLACES = [{ dx: 7, dy: -6, align: "left" }, { dx: 7, dy: 9, align: "left" }, { dx: -7, dy: -6, align: "right" }, { dx: -7, dy: 9, align: "right" }];

/** Tags by their place beside the points; one that would lie on a point or on another tag is left out. */
function placedTags(rows, { x, y }, width, height) {
  const inside = [Math.max(60, width - 62), Math.max(60, height - 48)];
  const across = (value, one, length) => length * (along(value, one) - along(one.domain[0], one)) / (along(one.domain[1], one) - along(one.domain[0], one));
  const spots = rows.map((row) => [across(row.x, x, inside[0]), inside[1] - across(row.y, y, inside[1])]);
  const taken = spots.map(([left, top]) => [left - 5, top - 5, left + 5, top + 5]);
  const placed = TAG_PLACES.map(() => []);
  rows.forEach((row, k) => {
    if (!row.tag) return;
    const [left, top] = spots[k], wide = 5.8 * row.tag.length;
    for (const [p, { dx, dy, align }] of TAG_PLACES.entries()) {
      const start = left + dx - (align === "right" ? wide : 0);
      const box = [start, top + dy - 8, start + wide, top + dy + 1];
      if (box[0] < 0 || box[1] < -4 || box[2] > inside[0] + 4 || taken.some((other, o) => o !== k && box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3])) continue;
      taken.push(box);
      placed[p].push(row);
      return;
    }
  });
  return placed;
}

function axis(one, theme, count) {
  const scale = { type: one.scale, domain: one.domain, nice: false, ...(one.scale !== "log" && { zero: false }), ...(one.base && { base: one.base }),
    ...(one.scale === "symlog" && { constant: one.constant }) };
  const values = one.values ?? (one.scale === "symlog" ? symlogTicks(one.domain, one.constant) : undefined);
  return { type: "quantitative", scale, title: one.title, axis: { format: one.format ?? ".6~g", tickCount: values ? 99 : count, labelOverlap: "greedy",
    labelSeparation: 4, grid: true, gridOpacity: 0.45, ...(values && { values }) } };
}

function specOf(plot, width, theme) {
  const { x, y } = plot;
  const rows = rowsOf(plot);
  const position = { x: { field: "x", ...axis(x, theme, Math.max(3, width / 70)) }, y: { field: "y", ...axis(y, theme, 6) } };
  const plain = (field, type = "nominal") => ({ field, type, scale: null });
  const paths = plot.series.flatMap((one, s) => (one.path ?? []).map((p) => ({ s, colour: one.colour, dash: one.dash ?? [1, 0],
    x: clamp(p.x, x.domain), y: clamp(p.y, y.domain) })));
  const layer = (name, values, mark, encoding) =>
    values.length ? [{ name, data: { values }, mark: { aria: false, clip: false, ...mark }, encoding: { ...position, ...encoding } }] : [];
  const dashes = [...new Set(paths.map((p) => String(p.dash)))].map((key) => paths.filter((p) => String(p.dash) === key));
  const uneven = (low, high) => rows.filter((row) => row[high] > row[low]);
  return {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json", description: plot.description,
    width, height: plot.height ?? 250, autosize: { type: "fit", contains: "padding" }, background: null, padding: 2,
    layer: [
      ...layer("references", (plot.references ?? []).map((at) => ({ x: x.domain[0], y: at })),
        { type: "rule", strokeDash: [5, 4], color: theme.text, opacity: 0.55 }, { x: undefined }),
      ...layer("front", (plot.front ?? []).map((p) => ({ x: clamp(p.x, x.domain), y: clamp(p.y, y.domain) })),
        { type: "line", interpolate: "step-after", color: theme.front, strokeWidth: 1.5, opacity: 0.8 }, {}),
      ...dashes.flatMap((some, k) => layer(`lines${k}`, some, { type: "line", strokeWidth: 1.6, strokeDash: some[0].dash, opacity: 0.85 },
        { detail: plain("s"), stroke: plain("colour"), order: { field: "x", type: "quantitative" } })),
      ...layer("across", uneven("xl", "xh"), { type: "rule", opacity: 0.55 }, { x: { ...position.x, field: "xl" }, x2: { field: "xh" }, color: plain("colour") }),
      ...layer("upright", uneven("yl", "yh"), { type: "rule", opacity: 0.55 }, { y: { ...position.y, field: "yl" }, y2: { field: "yh" }, color: plain("colour") }),
      ...placedTags(rows, plot, width, plot.height ?? 250).flatMap((some, k) =>
        layer(`tags${k}`, some, { type: "text", ...TAG_PLACES[k], fontSize: 10, color: theme.soft }, { text: { field: "tag" } })),
      ...layer("points", rows, { type: "point", strokeWidth: 1.6, aria: true },
        { stroke: plain("colour"), fill: plain("colour"), fillOpacity: plain("fill", "quantitative"), shape: plain("shape"), size: plain("size", "quantitative"),
          description: { field: "says" } }),
    ],
    config: { font: "system-ui, sans-serif", view: { stroke: theme.line },
      axis: { labelColor: theme.soft, titleColor: theme.text, titleFontWeight: 500, titleFontSize: 11, labelFontSize: 11, gridColor: theme.line,
        domainColor: theme.line, tickColor: theme.line, titleLimit: 400 } },
  };
}

/** Draw a plot into its host and let its points be hovered, focused and opened. */
async function draw(host, plot) {
  const theme = night.matches ? DARK : LIGHT;
  await vegaEmbed(host, specOf(plot, Math.max(220, host.clientWidth), theme),
    { mode: "vega-lite", renderer: "svg", actions: false, tooltip: false, hover: false, defaultStyle: false });
  const marks = [...host.querySelectorAll("g.points_marks path")].sort((a, b) => a.__data__.x - b.__data__.x || a.__data__.y - b.__data__.y);
  const go = (from, to) => {
    if (!marks[to]) return;
    marks[from].tabIndex = -1;
    marks[to].tabIndex = 0;
    marks[to].focus();
  };
  marks.forEach((mark, place) => {
    const { datum } = mark.__data__;
    mark.setAttribute("tabindex", place ? -1 : 0);
    mark.setAttribute("role", "button");
    const show = () => plot.tell(datum, mark.getBoundingClientRect());
    mark.addEventListener("pointerenter", show);
    mark.addEventListener("focus", show);
    mark.addEventListener("pointerleave", plot.hush);
    mark.addEventListener("blur", plot.hush);
    mark.addEventListener("click", () => plot.open(datum));
    mark.addEventListener("keydown", (event) => {
      const step = { ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1, ArrowUp: place - 1, Home: 0, End: marks.length - 1 }[event.key];
      if (step !== undefined) go(place, step);
      else if (event.key === "Enter" || event.key === " ") plot.open(datum);
      else if (event.key === "Escape") plot.hush();
      else return;
      event.preventDefault();
    });
  });
}

Object.assign(window, { charts: { look, referenceLook, domainOf, draw, number, night, DASHES } });
