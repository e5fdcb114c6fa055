// Shows the values under the pointer in every chart.
for (const figure of document.querySelectorAll("figure")) {
  const source = figure.querySelector("script");
  if (!source) continue;
  const { x, lines } = JSON.parse(source.textContent);
  const [low, high, start, end] = x;
  const svg = figure.querySelector("svg");
  const cursor = figure.querySelector(".cursor");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);

  const nearest = (points, step) =>
    points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const unit = box.width / svg.viewBox.baseVal.width;
    const place = (event.clientX - box.left) / unit;
    const wanted = low + ((place - start) / (end - start)) * (high - low);
    const found = lines.map((line) => ({ line, point: nearest(line.points, wanted) }));
    const step = nearest(found.map(({ point }) => point), wanted)[0];
    const at = start + ((step - low) / (high - low)) * (end - start);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.style.visibility = "visible";
    const head = document.createElement("b");
    head.textContent = `step ${step.toLocaleString("en")}`;
    tip.replaceChildren(head);
    for (const { line, point } of found) {
      const row = document.createElement("div");
      const mark = document.createElement("i");
      mark.className = `mark s${line.run}`;
      const other = point[0] === step ? "" : ` (step ${point[0]})`;
      row.append(mark, lines.length > 1 ? `${line.label}: ${point[1]}${other}` : point[1]);
      tip.append(row);
    }
    tip.hidden = false;
    const across = box.left - figure.getBoundingClientRect().left + at * unit;
    tip.style.left = across > box.width / 2 ? "" : `${across + 14}px`;
    tip.style.right = across > box.width / 2 ? `${figure.clientWidth - across + 14}px` : "";
    tip.style.top = "44px";
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cursor.style.visibility = "hidden";
  });
}
