"use strict";
(() => {
  const page = JSON.parse(document.getElementById("figures").textContent);
  const hidden = new Set();
  const shown = new Map(); // figure name -> its current variant
  const PRINT = window.matchMedia("print");
  let printing = false;
  let loaded = false; // the plotting library

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const own = (method) => colour("m" + (Math.max(0, page.methods.indexOf(method)) % 8));

  function faded(hex, alpha) {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${r},${g},${b},${alpha})`;
  }

  function coloured(trace, width) {
    const meta = trace.meta || {};
    const t = { ...trace };
    if (meta.method !== undefined) {
      const c = own(meta.method);
      const dash = ["solid", "dash", "dot", "dashdot"][Math.floor(page.methods.indexOf(meta.method) / 8) % 4];
      t.line = { width: 2.2, color: c, dash, ...trace.line };
      t.marker = { size: 7, color: c, ...trace.marker };
      if (trace.type === "box") { t.line = { width: 1.5, color: c }; t.fillcolor = faded(c, 0.15); }
      if (trace.fill) t.fillcolor = faded(c, 0.18);
      if (trace.error_y) t.error_y = { ...trace.error_y, color: c };
      t.visible = !hidden.has(meta.method);
    } else if (meta.role === "reference") {
      t.line = { color: colour("reference"), width: 1.5, dash: "dash" };
    } else if (meta.role === "before" || meta.role === "after") {
      t.marker = { color: colour(meta.role) };
    } else if (meta.role === "corner") {
      t.marker = { size: 11, color: "#ffffff", line: { color: "#111111", width: 2 } };
      t.textfont = { color: "#111111", size: 13, shadow: "0 0 4px #ffffff, 0 0 4px #ffffff, 0 0 6px #ffffff", weight: 700 };
    } else if (meta.role === "surface") {
      t.colorscale = "Viridis";
      t.reversescale = meta.better === "low";
      if (width < 560) t.colorbar = { ...trace.colorbar, orientation: "h", y: 1, yanchor: "bottom", nticks: 6 };
    } else if (meta.role === "diverging") {
      t.colorscale = [[0, faded(colour("down"), 0.55)], [0.5, faded(colour("reference"), 0.06)], [1, faded(colour("up"), 0.55)]];
      t.textfont = { color: colour("ink") };
    }
    return t;
  }

  function legendRows(traces, width) {
    const named = traces.filter((t) => t.name && t.visible !== false && t.showlegend !== false);
    const each = Math.max(0, ...named.map((t) => 7.5 * t.name.length + 45)); // columns are as wide as the widest
    return named.length ? Math.ceil(named.length / Math.max(1, Math.floor((width - 80) / each))) : 0;
  }

  // Long names lose letters from the front, "layers.0.attn.proj" -> "l.0.attn.proj"; hovering shows them whole.
  function abbreviated(name, room) {
    const parts = name.split(".");
    for (let i = 0; i < parts.length - 1 && parts.join(".").length > room; i++) {
      if (!/^\d+$/.test(parts[i])) parts[i] = parts[i][0] || "";
    }
    return parts.join(".");
  }

  function named(layout, traces, width) {
    if (!layout.yaxis || layout.yaxis.type !== "category") return {};
    const names = [...new Set(traces.flatMap((t) => t.y || []))].map(String);
    return { tickmode: "array", tickvals: names, ticktext: names.map((n) => abbreviated(n, Math.floor(width / 14))) };
  }

  function themed(layout, width, rows) {
    const axis = { gridcolor: colour("grid"), linecolor: colour("line"), zerolinecolor: colour("line"), automargin: true };
    const narrow = width < 560;
    const height = (layout.height || (narrow ? 340 : 400)) + 20 * Math.max(0, rows - 1);
    return {
      ...layout,
      width, height: layout.yaxis && layout.yaxis.scaleanchor ? Math.min(height, Math.round(width * (narrow ? 0.9 : 0.8))) : height,
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: colour("ink"), size: narrow ? 11.5 : 13 },
      margin: { l: narrow ? 48 : 62, r: 14, t: 14, b: 52, ...layout.margin },
      legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0, xanchor: "left", bgcolor: "rgba(0,0,0,0)" },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
      dragmode: false, showlegend: true,
    };
  }

  function draw(figure) {
    const box = document.getElementById("plot-" + figure.name);
    const variant = shown.get(figure.name);
    const width = printing ? 660 : Math.max(240, box.clientWidth);
    const config = { displaylogo: false, responsive: false, displayModeBar: false, scrollZoom: false };
    const traces = variant.data.map((trace) => coloured(trace, width));
    const layout = themed(variant.layout, width, legendRows(traces, width));
    layout.yaxis = { ...layout.yaxis, ...named(layout, variant.data, width) };
    Plotly.react(box, traces, layout, config);
  }

  const drawAll = () => { if (loaded) page.figures.forEach(draw); };

  // ---- menus: a combination that does not exist falls back to the nearest one that does ------------------------------

  function choose(figure, changed) {
    const menus = [...document.querySelectorAll(`[data-figure="${figure.name}"] select`)];
    const wanted = menus.map((m) => Number(m.value));
    const keys = Object.keys(figure.variants).map((k) => (k === "" ? [] : k.split(",").map(Number)));
    const likeness = (key) => key.reduce((sum, v, i) => sum + (v === wanted[i] ? (i === changed ? 100 : 1) : 0), 0);
    const best = keys.reduce((a, b) => (likeness(b) > likeness(a) ? b : a));
    menus.forEach((m, i) => { m.value = String(best[i]); });
    shown.set(figure.name, figure.variants[best.join(",")]);
  }

  for (const figure of page.figures) {
    document.querySelectorAll(`[data-figure="${figure.name}"] select`).forEach((menu, i) => {
      menu.addEventListener("change", () => { choose(figure, i); drawAll(); });
    });
    choose(figure, -1);
  }

  // ---- methods ------------------------------------------------------------------------------------------------------

  document.querySelectorAll(".toggle").forEach((button) => {
    button.style.setProperty("--own", `var(--m${page.methods.indexOf(button.dataset.method) % 8})`);
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!on));
      if (on) hidden.add(button.dataset.method); else hidden.delete(button.dataset.method);
      drawAll();
    });
  });

  // ---- tables ---------------------------------------------------------------------------------------------------------

  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const value = (row, i) => {
      const cell = row.cells[i];
      return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
    };
    const compare = (a, b) => {
      if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // what has no number comes last
      return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    };
    heads.forEach((head, i) => {
      head.querySelector("button").addEventListener("click", () => {
        const first = head.classList.contains("number") ? "descending" : "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        const order = head.getAttribute("aria-sort") === first ? other : first;
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const rows = [...body.rows].map((row) => [value(row, i), row]);
        rows.sort(([a], [b]) => (typeof a === typeof b ? sign : 1) * compare(a, b));
        rows.forEach(([, row]) => body.append(row));
      });
    });
  });

  // ---- size, theme, print ---------------------------------------------------------------------------------------------

  let pending = 0;
  const later = () => { cancelAnimationFrame(pending); pending = requestAnimationFrame(drawAll); };
  const print = (on) => { printing = on; drawAll(); };
  window.addEventListener("resize", later);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", later);
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
  PRINT.addEventListener("change", (event) => print(event.matches));

  // ---- tables wider or longer than their place say so -----------------------------------------------------------------

  const scrolls = [...document.querySelectorAll(".scroll")];
  const hint = (box) => {
    const more = { left: box.scrollLeft > 1, right: box.scrollLeft + box.clientWidth < box.scrollWidth - 1,
      below: box.scrollTop + box.clientHeight < box.scrollHeight - 1 };
    box.parentElement.dataset.more = Object.keys(more).filter((side) => more[side]).join(" ");
  };
  scrolls.forEach((box) => { box.addEventListener("scroll", () => hint(box), { passive: true }); hint(box); });
  window.addEventListener("resize", () => scrolls.forEach(hint));

  // ---- the plotting library is unpacked, then everything is drawn -----------------------------------------------------

  async function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed.textContent), (c) => c.charCodeAt(0));
    const script = document.createElement("script");
    script.textContent = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    document.head.append(script);
  }

  async function start() {
    const packed = document.getElementById("plotly");
    if (packed && typeof DecompressionStream === "undefined") {
      document.querySelectorAll(".plot").forEach((box) => { box.textContent = "This figure needs a browser of 2023 or later."; });
    } else if (packed) {
      await unpack(packed);
      loaded = true;
      drawAll();
    }
    document.documentElement.dataset.ready = "true";
  }
  start();
})();
