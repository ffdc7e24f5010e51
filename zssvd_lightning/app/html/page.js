"use strict";
// Shows the spectrum and the cut of the layer that is chosen in the map of ranks.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [440, 250, 62, 12, 26, 44];

  function add(parent, tag, attributes, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  }

  function line(parent, text, className) {
    const made = parent.appendChild(document.createElement("p"));
    made.textContent = text;
    if (className) made.className = className;
  }

  function powers(low, high) {
    const found = [];
    for (let power = Math.ceil(Math.log10(low)); power <= Math.log10(high); power++) found.push(power);
    const every = Math.ceil(found.length / 6);
    return found.filter((_, index) => index % every === 0);
  }

  // Draws singular values over their numbers, with lines at the rank and at the break-even rank.
  function draw(panel, layer, positions) {
    const positive = layer.spectrum.filter((value) => value > 0);
    if (!positive.length) return line(panel, "All singular values are 0.", "missing");
    const high = Math.max(...positive) * 1.3;
    const low = Math.max(Math.min(...positive), high * 1e-9) / 1.3;
    const count = Math.min(...layer.shape);
    const x = (number) => LEFT + ((WIDTH - LEFT - RIGHT) * (number - 1)) / Math.max(1, count - 1);
    const y = (value) => {
      const share = Math.log(Math.max(value, low) / low) / Math.log(high / low);
      return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM);
    };
    const chart = add(panel, "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img" });
    chart.setAttribute("aria-label", `Spectrum of ${layer.name}`);
    const floor = HEIGHT - BOTTOM;
    let ticks = powers(low, high).map((power) => 10 ** power);
    if (ticks.length < 2) ticks = [low * 1.3, Math.sqrt(low * high), high / 1.3];
    for (const tick of ticks) {
      add(chart, "path", { d: `M${LEFT} ${y(tick)}H${WIDTH - RIGHT}`, class: "grid" });
      const label = Number(tick.toPrecision(2));
      add(chart, "text", { x: LEFT - 6, y: y(tick) + 4, class: "tick end" }, label >= 1e-3 && label < 1e5 ? label : label.toExponential());
    }
    const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000].find((size) => size * 6 >= count) || count;
    const numbers = [1];
    for (let number = step; number <= count; number += step) if (number > 1 + step / 2) numbers.push(number);
    for (const number of numbers) {
      add(chart, "path", { d: `M${x(number)} ${floor}v4`, class: "axis" });
      add(chart, "text", { x: Math.min(x(number), WIDTH - 14), y: floor + 18, class: "tick middle" }, number);
    }
    add(chart, "path", { d: `M${LEFT} ${floor}H${WIDTH - RIGHT}`, class: "axis" });
    add(chart, "text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 8, class: "title middle" }, "component");
    add(chart, "text", { x: 2, y: 14, class: "title" }, "singular value (in the metric)");
    const points = layer.spectrum.map((value, index) => [positions[index], value]).filter(([, value]) => value !== null);
    const path = points.map(([number, value]) => `${x(number).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
    add(chart, "path", { d: `M${path}`, class: "line" });
    if (layer.highest > 0 && layer.highest < count) vertical(x(layer.highest), "even");
    if (layer.rank !== null) vertical(x(layer.rank), "cut");
    function vertical(at, kind) {
      add(chart, "path", { d: `M${at.toFixed(1)} ${TOP}V${floor}`, class: `line ${kind}` });
    }
  }

  function legend(panel, layer) {
    const keys = panel.appendChild(document.createElement("p"));
    keys.className = "legend";
    const entries = [];
    if (layer.rank !== null) entries.push(["var(--other)", `cut at rank ${layer.rank}`]);
    entries.push(["var(--good)", `break-even rank ${layer.highest}`]);
    for (const [color, text] of entries) {
      const entry = keys.appendChild(document.createElement("span"));
      const key = entry.appendChild(document.createElement("i"));
      key.className = "key";
      key.style.background = color;
      entry.append(text);
    }
  }

  function explore(explorer) {
    const data = JSON.parse(explorer.parentElement.querySelector("script.layers").textContent);
    const cells = [...explorer.querySelectorAll("td[data-layers]")];
    const layers = explorer.querySelector("select.layer");
    const measure = explorer.querySelector("select.measure");
    const panel = explorer.querySelector(".spectrum");

    function show(index) {
      const layer = data.layers[index];
      panel.textContent = "";
      const state = layer.rank === null ? "stays dense" : `rank ${layer.rank} of ${Math.min(...layer.shape)}`;
      const bits = layer.bits ? ", in 8 bits" : "";
      line(panel, `${layer.name}: ${layer.shape.join(" by ")}, ${state}${bits}, ${layer.parameters} parameters kept (${layer.kept})`, "about");
      if (layer.spectrum.length) {
        draw(panel, layer, data.positions[Math.min(...layer.shape)]);
        legend(panel, layer);
      } else line(panel, "The spectrum is not in this report.", "missing");
    }

    function choose(cell) {
      for (const other of cells) {
        other.classList.toggle("chosen", other === cell);
        other.tabIndex = other === cell ? 0 : -1;
        other.setAttribute("aria-selected", other === cell);
      }
      const indices = cell.dataset.layers.split(" ");
      layers.textContent = "";
      for (const index of indices) layers.add(new Option(data.layers[index].name, index));
      show(indices[0]);
    }

    function neighbor(cell, key) {
      const rows = [...cell.closest("tbody").rows];
      const across = { ArrowLeft: -1, ArrowRight: 1 }[key] || 0;
      const down = { ArrowUp: -1, ArrowDown: 1 }[key] || 0;
      let [row, column] = [rows.indexOf(cell.parentElement) + down, cell.cellIndex + across];
      while (rows[row] && rows[row].cells[column]) {
        if (rows[row].cells[column].dataset.layers) return rows[row].cells[column];
        [row, column] = [row + down, column + across];
      }
      return null;
    }

    for (const cell of cells) {
      cell.addEventListener("click", () => choose(cell));
      cell.addEventListener("keydown", (event) => {
        if (!event.key.startsWith("Arrow")) return;
        event.preventDefault();
        const next = neighbor(cell, event.key);
        if (next) {
          choose(next);
          next.focus();
        }
      });
    }
    layers.addEventListener("change", () => show(layers.value));
    measure.addEventListener("change", () => {
      for (const map of explorer.querySelectorAll(".map")) map.dataset.measure = measure.value;
    });
    choose(cells[0]);
  }

  document.querySelectorAll(".explorer").forEach(explore);

  function open(target) {
    if (target && target.tagName === "DETAILS") target.open = true;
  }
  const ofHash = () => open(document.getElementById(location.hash.slice(1)));
  window.addEventListener("hashchange", ofHash);
  ofHash();
  window.addEventListener("beforeprint", () => document.querySelectorAll("details.run").forEach(open));
})();
