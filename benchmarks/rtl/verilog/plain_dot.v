// Dot-product PE as it is written for an FPGA: LANES products by `*`, which synthesis gives to hard
// multipliers, and their sum on the partial sum from above by `+`. Ports and cycles are mac_dot's.
module plain_dot #(
    parameter LANES = 8,
    parameter WIDTH = 8,
    parameter PSUM = 28
) (
    input                         clock,
    input                         load,
    input      [LANES*WIDTH-1:0]  activations_in,
    input      [LANES*WIDTH-1:0]  weights_in,
    output reg [LANES*WIDTH-1:0]  weights,
    input      [PSUM-1:0]         psum_in,
    output reg [PSUM-1:0]         psum
);
    localparam PRODUCT = 2 * WIDTH;
    localparam SUM = PRODUCT + $clog2(LANES);

    reg [LANES*WIDTH-1:0] activations;  // taken from the column's bus with `load`
    // A tree in a heap: node n is the sum of 2n and 2n + 1, and the leaves are the products.
    wire signed [SUM-1:0] nodes [1:2*LANES-1];
    genvar i;
    generate
        for (i = 0; i < LANES; i = i + 1) begin : lane
            wire signed [WIDTH-1:0] x = activations[i*WIDTH +: WIDTH];
            wire signed [WIDTH-1:0] w = weights_in[i*WIDTH +: WIDTH];
            wire signed [PRODUCT-1:0] product = x * w;
            assign nodes[LANES + i] = product;
        end
        for (i = 1; i < LANES; i = i + 1) begin : node
            assign nodes[i] = nodes[2*i] + nodes[2*i + 1];
        end
    endgenerate

    always @(posedge clock) begin
        if (load) activations <= activations_in;
        weights <= weights_in;
        psum    <= $signed(psum_in) + nodes[1];
    end
endmodule
