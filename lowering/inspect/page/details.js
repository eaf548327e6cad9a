// The panel at the bottom: what is known of the chosen weight or line, and the generated code behind it.

const panel = byId("details");
let opener = null; // gets the focus back

function showDetails(title, from, ...contents) {
  opener = from;
  byId("details-title").replaceChildren(...title);
  byId("details-body").replaceChildren(...contents);
  byId("details-body").scrollTop = 0;
  panel.hidden = false;
  document.body.classList.add("with-details");
}

function closeDetails() {
  if (panel.hidden) return;
  const hadFocus = panel.contains(document.activeElement);
  panel.hidden = true;
  document.body.classList.remove("with-details");
  if (hadFocus) opener?.focus();
}

/** Moves the focus into the panel if it is about `item` already. */
function enterDetails(item) {
  if (panel.hidden || opener !== item) return false;
  byId("details-body").focus();
  return true;
}

const paragraph = (...contents) => element("p", {}, ...contents);

function weightDetails(weight, from) {
  const { bytes_before: before, bytes_after: after, bytes_dequantized: copies } = weight;
  const copied = copies ? `, ${size(copies)} of it dequantized` : "";
  const facts = paragraph(chip(weight.action), ` ${weight.reason}. ${size(before)} before, ${size(after)} after${copied}.`);
  const found = chosen.run.graphs.flatMap((graph) => kernelsReading(graph, [weight.name]).map((kernel) => [graph, kernel]));
  const graphs = chosen.run.graphs.filter((graph) => hasWeight(graph, weight.name));
  const contents = found.length
    ? found.map(([graph, kernel]) => kernelView(graph, kernel))
    : [paragraph(whyNoKernel(graphs[0] ?? chosen.graph, "reads this weight"))];
  showDetails([element("code", {}, weight.name)], from, facts, ...contents);
}

function lineDetails(row, from) {
  const line = row.lines[from.closest(".pane").side];
  const { graph } = chosen;
  const computing = kernelsComputing(graph, row.lines[1]);
  const weights = [...weightsOf(row)];
  const reading = kernelsReading(graph, weights).filter((kernel) => !computing.includes(kernel));
  const contents = computing.map((kernel) => kernelView(graph, kernel));
  if (!computing.length) contents.push(paragraph(whyNotComputed(graph, row)));
  if (reading.length) {
    contents.push(element("h3", {}, `Kernels that read ${weights.join(", ")}`));
    contents.push(...reading.map((kernel) => kernelView(graph, kernel)));
  }
  showDetails([element("code", {}, line.text.trim())], from, ...contents);
}

// --- which kernels ----------------------------------------------------------------------------------------------

function kernelsComputing(graph, line) {
  return line?.node ? graph.kernels.filter((kernel) => kernel.nodes.includes(line.node)) : [];
}

function kernelsReading(graph, weights) {
  return graph.kernels.filter((kernel) => kernel.weights.some((name) => weights.includes(name)));
}

const hasWeight = (graph, name) =>
  [...graph.before, ...graph.after].some((line) => line.weights?.includes(name));

function whyNotComputed(graph, row) {
  const line = row.lines[1] ?? row.lines[0];
  if (row.lines.length > 1 && !row.lines[1]) return "The lowering took this line out: the compiled graph does not have it.";
  if (/^\s*(input|constant) /.test(line.text)) return "An input of the graph: nothing is computed here.";
  if (!line.node) return "The end of the graph: nothing is computed here.";
  return whyNoKernel(graph, "computes this line by itself");
}

function whyNoKernel(graph, what) {
  if (graph?.from_cache) return "The code of this graph came from a cache: it was not generated again, so it is not known.";
  if (!graph?.kernels.length) return "No generated code was recorded for this graph.";
  return `No kernel ${what}, as far as the generated code tells: it was fused away, or is only a view.`;
}

function kernelView(graph, kernel) {
  const { graphs } = chosen.run;
  const where = graphs.length > 1 ? ` in graph ${graphs.indexOf(graph) + 1} of ${graphs.length}` : "";
  const made = element("article", { class: "kernel" }, element("h3", {}, element("code", {}, kernel.name), where));
  made.append(element("pre", { class: "call", "aria-label": "The call" }, kernel.call));
  if (kernel.source >= 0) made.append(element("pre", { "aria-label": "The source" }, graph.sources[kernel.source]));
  else made.append(paragraph("A kernel of a library: its source is not part of the generated code."));
  return made;
}

function startDetails() {
  byId("close").addEventListener("click", closeDetails);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.target.closest("input, select")) closeDetails();
  });
}
