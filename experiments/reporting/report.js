document.querySelectorAll('.copy').forEach(function (box) {
  var button = document.createElement('button');
  button.type = 'button'; button.textContent = 'Copy';
  button.addEventListener('click', function () {
    var code = box.querySelector('code');
    getSelection().selectAllChildren(code);
    var done = function () { button.textContent = 'Copied'; };
    var old = function () { if (document.execCommand('copy')) { done(); } };
    if (navigator.clipboard) { navigator.clipboard.writeText(code.textContent).then(done, old); } else { old(); }
  });
  box.appendChild(button);
});
