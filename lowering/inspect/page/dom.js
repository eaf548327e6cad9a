"use strict";
// Helpers of the other scripts, and what they share: the data, and what is chosen at the moment.

const runs = JSON.parse(document.getElementById("data").textContent);

const chosen = {
  run: runs[0],
  graph: null, // one of run.graphs
  weights: new Set(), // names
  row: -1, // of the graph's diff
};

const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** "16.5 MiB" for a number of bytes. */
function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < 3) {
    bytes /= 1024;
    unit += 1;
  }
  return `${bytes.toFixed([0, 1, 1, 2][unit])} ${units[unit]}`;
}

const exactBytes = (bytes) => `${bytes.toLocaleString("en")} bytes`;

const chip = (action) => element("span", { class: `chip act-${action}` }, action);

/** Puts `child` in sight by moving what scrolls inside `box` only, not the page. */
function scrollWithin(box, child, margin = 0) {
  const outer = box.getBoundingClientRect();
  const inner = child.getBoundingClientRect();
  const above = inner.top - outer.top - margin;
  const below = inner.bottom - outer.bottom + margin;
  if (above < 0) box.scrollTop += above;
  else if (below > 0) box.scrollTop += below;
}

/** Makes `item` the one item of `container` that the Tab key reaches. */
function rest(container, item) {
  container.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
  item?.setAttribute("tabindex", "0");
}

/** Arrow keys, Home, End and Page keys move between the items of `container`; Enter and Space choose one. */
function rove(container, selector, choose) {
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15, Home: -Infinity, End: Infinity };
  container.addEventListener("keydown", (event) => {
    const item = event.target.closest(selector);
    if (item === null || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose(item);
    } else if (event.key in steps) {
      event.preventDefault();
      const items = [...container.querySelectorAll(selector)].filter((each) => !each.hidden);
      const position = items.indexOf(item) + steps[event.key];
      const next = items[Math.min(Math.max(position, 0), items.length - 1)];
      rest(container, next);
      next.focus();
    }
  });
  container.addEventListener("focusin", (event) => {
    const item = event.target.closest(selector);
    if (item !== null) rest(container, item);
  });
}
