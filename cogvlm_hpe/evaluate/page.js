// The gallery and the tables of report.html. State lives in the address (#system=lora&kind=blended&sort=worst), so that
// a view can be sent to somebody. Texts are set as text, never as HTML: answers and names may hold anything.
"use strict";
(() => {
  const SORTS = {
    worst: (a, b) => (b.error ?? 999) - (a.error ?? 999),
    best: (a, b) => (a.error ?? 999) - (b.error ?? 999),
    yaw: (a, b) => Math.abs(a.truth[0]) - Math.abs(b.truth[0]),
    smallest: (a, b) => a.height - b.height,
  };
  const MOST = 120;
  const FILTERS = ["set", "system", "kind", "why", "facing"];

  const make = (tag, text, parent) => {
    const node = document.createElement(tag);
    node.textContent = text;
    parent.append(node);
    return node;
  };

  function gallery(heads, root) {
    const controls = make("p", "", root), count = make("output", "", root), grid = make("div", "", root);
    grid.className = "heads";
    const selects = {};
    const add = (name, values) => {
      const select = make("select", "", make("label", name + " ", controls));
      select.name = name;
      for (const value of values) make("option", value, select);
      select.addEventListener("change", () => {
        const state = new URLSearchParams(location.hash.slice(1));
        if (select.selectedIndex) state.set(name, select.value); else state.delete(name);
        location.hash = state.toString();
      });
      selects[name] = select;
    };
    for (const name of FILTERS) add(name, ["any", ...new Set(heads.map((head) => head[name]))]);
    add("sort", Object.keys(SORTS));

    const show = () => {
      const state = new URLSearchParams(location.hash.slice(1));
      for (const [name, select] of Object.entries(selects)) {
        const wanted = [...select.options].findIndex((option) => option.value === state.get(name));
        select.selectedIndex = Math.max(0, wanted);
      }
      const chosen = heads.filter((head) =>
        FILTERS.every((name) => !selects[name].selectedIndex || head[name] === selects[name].value));
      chosen.sort(SORTS[selects.sort.value]);
      const cut = chosen.length > MOST ? `, the first ${MOST} are shown: choose above to see others` : "";
      count.textContent = `${chosen.length} of ${heads.length} heads${cut}`;
      grid.replaceChildren();
      for (const head of chosen.slice(0, MOST)) {
        const figure = make("figure", "", grid), image = make("img", "", figure);
        image.src = head.image;
        image.alt = `${head.id}, ${head.system}`;
        const error = head.error === null ? head.kind : `${head.error.toFixed(1)}°`;
        make("figcaption", `${head.system} · ${error} · yaw ${head.truth[0].toFixed(0)}°`, figure);
        make("code", head.text, figure).title = head.id;
      }
    };
    window.addEventListener("hashchange", show);
    show();
  }

  // A click on a heading sorts by the number a cell begins with, or by its text; a second click turns the order. Cells
  // without a number ("–") stay last either way.
  function sortable(table) {
    const headings = [...table.tHead.rows].at(-1).cells, rows = [...table.tBodies[0].rows];
    [...headings].forEach((heading, column) => {
      heading.addEventListener("click", () => {
        const turn = heading.dataset.order === "up" ? -1 : 1;
        for (const other of headings) delete other.dataset.order;
        heading.dataset.order = turn === 1 ? "up" : "down";
        const value = (row) => row.cells[column].textContent;
        const numeric = rows.every((row) => value(row) === "–" || !Number.isNaN(parseFloat(value(row))));
        rows.sort((a, b) => {
          const [x, y] = [parseFloat(value(a)), parseFloat(value(b))];
          if (!numeric) return turn * value(a).localeCompare(value(b));
          return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : turn * (x - y);
        });
        rows.forEach((row) => row.parentNode.append(row));
      });
    });
  }

  // Above a folded table: words that a row must hold to be shown.
  function filterable(details) {
    const label = make("label", "only rows with ", details), input = make("input", "", label);
    const rows = [...details.querySelectorAll("tbody tr")], summary = details.querySelector("summary");
    summary.after(label);
    input.type = "search";
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/);
      for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
      summary.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
    });
  }

  document.querySelectorAll("details").forEach(filterable);
  document.querySelectorAll("table").forEach(sortable);
  const data = document.getElementById("gallery-data");
  if (data) gallery(JSON.parse(data.textContent), document.getElementById("gallery"));
})();
