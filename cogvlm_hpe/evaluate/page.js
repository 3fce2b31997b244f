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
      count.textContent = `${chosen.length} of ${heads.length} heads`;
      grid.replaceChildren();
      for (const head of chosen) {
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

  // A click on a heading sorts by the number a cell begins with, or by its text; a second click turns the order.
  function sortable(table) {
    const rows = [...table.rows].slice(1);
    [...table.rows[0].cells].forEach((heading, column) => {
      heading.addEventListener("click", () => {
        const turn = heading.dataset.order === "up" ? -1 : 1;
        for (const other of table.rows[0].cells) delete other.dataset.order;
        heading.dataset.order = turn === 1 ? "up" : "down";
        const value = (row) => row.cells[column].textContent;
        rows.sort((a, b) => {
          const [x, y] = [parseFloat(value(a)), parseFloat(value(b))];
          return turn * (Number.isNaN(x) || Number.isNaN(y) ? value(a).localeCompare(value(b)) : x - y);
        });
        rows.forEach((row) => row.parentNode.append(row));
      });
    });
  }

  document.querySelectorAll("table").forEach(sortable);
  const data = document.getElementById("gallery-data");
  if (data) gallery(JSON.parse(data.textContent), document.getElementById("gallery"));
})();
