// The API's description in Swagger UI. A key that is given there stays in this page, and goes when it is closed.
const ui = SwaggerUIBundle({
  url: '/openapi.json',
  dom_id: '#docs',
  deepLinking: true,
  displayRequestDuration: true,
  validatorUrl: null, // the validator is on another server
  onComplete: () => {
    const key = sessionStorage.getItem('kshot-key')
    if (key) ui.preauthorizeApiKey('key', key)
  },
})
