// The design explorer: reads EXPLORER (designs.js, written by docs/explorer.py); no library, no request.
"use strict";

(() => {
  const COMPONENTS = ["array", "encoder", "registers", "sram", "dram"];
  const COLORS = { int8: "#d9822b", group: "#5b7fde" };
  const SVG = "http://www.w3.org/2000/svg";
  const WIDTH = 460, HEIGHT = 320, LEFT = 62, RIGHT = 12, TOP = 14, BOTTOM = 44;

  const networks = Object.fromEntries(
    Object.entries(EXPLORER.networks).map(([title, { macs, designs }]) => [
      title,
      {
        macs,
        designs: designs.map((row) => Object.fromEntries(row.map((x, i) => [EXPLORER.fields[i], x]))),
      },
    ]),
  );
  const state = {
    network: Object.keys(networks)[0], rows: 32, cols: 32, g: 8, terms: 0.5,
    basis: "gates", part: "array", area: "",
  };

  // --- Elements ---------------------------------------------------------------------------------

  const element = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };

  const draw = (parent, name, attributes, text) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };

  const number = (x) => {
    if (x === null || Number.isNaN(x)) return "–";
    return x.toLocaleString("en-US", x >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 });
  };

  // --- Designs ----------------------------------------------------------------------------------

  const terms = (d) => (d.g ? d.k / d.g : null);
  const measured = (d) => d.gates_array !== null;
  const label = (d) => `${d.rows}×${d.cols}, ${d.g ? `groups of ${d.g}, k = ${d.k}` : "int8"}`;
  const parts = () => (state.part === "array" ? ["array", "encoder"] : COMPONENTS);
  const energy = (d, basis = state.basis, names = parts()) =>
    basis === "gates" && !measured(d)
      ? null
      : names.reduce((sum, name) => sum + d[`${basis}_${name}`], 0);

  const all = () => networks[state.network].designs;
  const find = (rows, cols, g, mean) =>
    all().find((d) => d.rows === rows && d.cols === cols && d.g === g && (!g || terms(d) === mean));
  const chosen = () => find(state.rows, state.cols, state.g, state.terms);
  const baseline = () => find(state.rows, state.cols, 0);
  const within = () => {
    const limit = parseFloat(state.area);
    return all().filter((d) => energy(d) !== null && !(d.area_mm2 > limit));
  };

  // The designs that no other beats in both cycles and energy, by rising cycles.
  const front = (designs) => {
    const sorted = [...designs].sort((a, b) => a.cycles - b.cycles || energy(a) - energy(b));
    let least = Infinity;
    return sorted.filter((d) => energy(d) < least && ((least = energy(d)), true));
  };

  // --- Plots ------------------------------------------------------------------------------------

  // An empty log-log plot; returns the drawing and the two scales.
  const axes = (svg, xs, ys, xTitle, yTitle) => {
    svg.replaceChildren();
    const scale = (values, from, to) => {
      const low = Math.log10(Math.min(...values)) - 0.08, high = Math.log10(Math.max(...values)) + 0.08;
      const place = (x) => from + ((Math.log10(x) - low) / (high - low)) * (to - from);
      const ticks = [];
      const steps = high - low > 2.5 ? [1] : [1, 2, 5];
      for (let e = Math.floor(low); e <= high; e++)
        for (const m of steps) {
          const x = m * 10 ** e;
          if (Math.log10(x) >= low && Math.log10(x) <= high) ticks.push(x);
        }
      return [place, ticks];
    };
    const [x, xTicks] = scale(xs, LEFT, WIDTH - RIGHT);
    const [y, yTicks] = scale(ys, HEIGHT - BOTTOM, TOP);
    const short = (v) =>
      v >= 1e9 ? `${v / 1e9}G` : v >= 1e6 ? `${v / 1e6}M` : v >= 1e3 ? `${v / 1e3}k` : `${+v.toPrecision(3)}`;
    const line = { stroke: "currentColor", "stroke-opacity": 0.15 };
    for (const tick of xTicks) {
      draw(svg, "line", { x1: x(tick), x2: x(tick), y1: TOP, y2: HEIGHT - BOTTOM, ...line });
      draw(svg, "text", { x: x(tick), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, short(tick));
    }
    for (const tick of yTicks) {
      draw(svg, "line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick), ...line });
      draw(svg, "text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick));
    }
    draw(svg, "text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 8, "text-anchor": "middle" }, xTitle);
    const middle = (TOP + HEIGHT - BOTTOM) / 2;
    draw(svg, "text", {
      x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})`,
    }, yTitle);
    return [x, y];
  };

  const drawFront = (svg) => {
    const designs = within(), design = chosen();
    if (!designs.length) {
      svg.replaceChildren();
      draw(svg, "text", { x: 20, y: 40 }, "No design is within the area limit.");
      return;
    }
    const [x, y] = axes(
      svg, designs.map((d) => d.cycles), designs.map((d) => energy(d)),
      "cycles per image", `energy per image (µJ), ${state.basis === "gates" ? "by gates" : "by the table"}`,
    );
    for (const [kind, color] of Object.entries(COLORS)) {
      const mine = designs.filter((d) => (d.g > 0) === (kind === "group"));
      const path = front(mine).map((d) => `${x(d.cycles)},${y(energy(d))}`).join(" ");
      draw(svg, "polyline", { points: path, fill: "none", stroke: color, "data-front": kind });
      for (const d of mine) {
        const dot = draw(svg, "circle", {
          cx: x(d.cycles), cy: y(energy(d)), r: 3.5, fill: color, "fill-opacity": 0.55, class: "dot",
        });
        draw(dot, "title", {}, `${label(d)}: ${number(d.cycles)} cycles, ${number(energy(d))} µJ`);
        dot.addEventListener("click", () => {
          Object.assign(state, { rows: d.rows, cols: d.cols, g: d.g });
          if (d.g) state.terms = terms(d);
          update();
        });
      }
    }
    if (designs.includes(design))
      draw(svg, "circle", {
        cx: x(design.cycles), cy: y(energy(design)), r: 8, fill: "none", stroke: "currentColor",
        "stroke-width": 2, class: "chosen",
      });
  };

  const drawRoofline = (svg) => {
    const { macs } = networks[state.network], design = chosen();
    const peak = (d) => d.rows * d.cols * (d.g ? d.g / d.k : 1);
    const shown = [baseline(), ...(design.g ? [design] : [])];
    const point = (d) => [macs / d.dram_bytes, macs / d.cycles];
    const intensities = shown.map((d) => point(d)[0]);
    const ridges = shown.map((d) => peak(d) / EXPLORER.bandwidth);
    const xs = [...intensities, ...ridges].flatMap((v) => [v / 3, v * 3]);
    const ys = [...shown.map((d) => point(d)[1] / 3), ...shown.map((d) => peak(d) * 1.5)];
    const [x, y] = axes(svg, xs, ys, "MAC per byte of DRAM traffic", "MAC per cycle");
    for (const d of shown) {
      const color = d.g ? COLORS.group : COLORS.int8;
      const ridge = peak(d) / EXPLORER.bandwidth;
      const start = Math.max(Math.min(...xs), Math.min(...ys) / EXPLORER.bandwidth);
      draw(svg, "polyline", {
        points: [[start, start * EXPLORER.bandwidth], [ridge, peak(d)], [Math.max(...xs), peak(d)]]
          .map(([a, b]) => `${x(a)},${y(b)}`).join(" "),
        fill: "none", stroke: color,
      });
      const [a, b] = point(d);
      const dot = draw(svg, "circle", { cx: x(a), cy: y(b), r: 6, fill: color, class: "roofline" });
      draw(dot, "title", {}, `${label(d)}: ${number(b)} MAC per cycle of ${number(peak(d))}`);
    }
  };

  // --- Table ------------------------------------------------------------------------------------

  const drawTable = (table) => {
    const design = chosen(), int8 = baseline();
    const names = { array: "array", encoder: "encoders", registers: "registers", sram: "SRAM", dram: "DRAM" };
    const bases = ["gates", "table"];
    const cells = (tag, values) => element("tr", {}, ...values.map((v) => element(tag, {}, v)));
    const saving = (basis, part) => {
      const ours = energy(design, basis, part);
      return ours === null ? "–" : `${(energy(int8, basis, part) / ours).toFixed(2)}×`;
    };
    table.replaceChildren(
      cells("th", [label(design), "by gates", "by the table"]),
      ...COMPONENTS.map((name) =>
        cells("td", [
          `${names[name]}, µJ`,
          ...bases.map((basis) => number(energy(design, basis, [name]))),
        ]),
      ),
      cells("td", ["saving of array energy", ...bases.map((basis) => saving(basis, ["array"]))]),
      cells("td", ["… with encoders", ...bases.map((basis) => saving(basis, ["array", "encoder"]))]),
      cells("td", ["… with encoders and memory", ...bases.map((basis) => saving(basis, COMPONENTS))]),
    );
  };

  const summary = (node) => {
    const design = chosen(), int8 = baseline();
    node.textContent =
      `${label(design)}: ${number(design.cycles)} cycles ` +
      `(${(int8.cycles / design.cycles).toFixed(2)}× the speed of int8 at this size), ` +
      `PEs ${(100 * design.utilization).toFixed(1)} % busy, ` +
      `${number(design.area_mm2)} mm², ${number(design.dram_bytes / 1e6)} MB of DRAM traffic.`;
  };

  // --- The page ---------------------------------------------------------------------------------

  const root = document.getElementById("explorer");
  const controls = {};
  const choice = (key, title, options) => {
    const select = element("select", { name: key },
      ...options.map(([value, text]) => element("option", { value }, text)));
    select.addEventListener("change", () => {
      state[key] = typeof state[key] === "number" ? Number(select.value) : select.value;
      update();
    });
    controls[key] = select;
    return element("label", {}, title, select);
  };
  const distinct = (values) => [...new Set(values)].filter((v) => v !== null).sort((a, b) => a - b);
  const options = (values, text = String) => distinct(values).map((v) => [v, text(v)]);
  const designs = all();
  const area = element("input", { name: "area", type: "number", min: 0, step: "any", placeholder: "any" });
  area.addEventListener("input", () => { state.area = area.value; update(); });

  const form = element("form", {},
    choice("network", "network", Object.keys(networks).map((title) => [title, title])),
    choice("rows", "rows", options(designs.map((d) => d.rows))),
    choice("cols", "columns", options(designs.map((d) => d.cols))),
    choice("g", "PE", options(designs.map((d) => d.g), (g) => (g ? `group PE, g = ${g}` : "int8 MAC"))),
    choice("terms", "terms per weight", options(designs.map(terms))),
    choice("basis", "energy", [["gates", "by gates"], ["table", "by the table"]]),
    choice("part", "of", [["array", "array and encoders"], ["all", "array, encoders and memory"]]),
    element("label", {}, "area limit, mm²", area),
  );
  form.addEventListener("submit", (event) => event.preventDefault());
  const plot = (title) => {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", title);
    return [svg, element("figure", {}, element("figcaption", {}, title), svg)];
  };
  const [frontSvg, frontFigure] = plot("All designs and their Pareto fronts (select a dot)");
  const [roofSvg, roofFigure] = plot("Roofline of this array");
  const text = element("p", { "aria-live": "polite", class: "summary" });
  const table = element("table");
  const legend = element("p", { class: "legend" },
    element("span", { style: `color:${COLORS.group}` }, "● group PEs "),
    element("span", { style: `color:${COLORS.int8}` }, "● int8 MACs"));

  const update = () => {
    for (const [key, select] of Object.entries(controls)) select.value = state[key];
    controls.terms.disabled = state.g === 0;
    summary(text);
    drawTable(table);
    drawFront(frontSvg);
    drawRoofline(roofSvg);
  };
  root.replaceChildren(form, text, legend, element("div", { class: "plots" }, frontFigure, roofFigure), table);
  update();
})();
