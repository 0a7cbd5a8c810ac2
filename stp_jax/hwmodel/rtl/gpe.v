// Group processing element: GROUP resident activations, one weight term a cycle.
//
// A valid term (sign, exponent, index) selects the activation `index`, shifts it left by `exponent`
// and adds or subtracts it. With `last`, the final slot of a group, the group's sum joins the
// partial sum from above and moves down at the same clock edge, so the row below may run exactly
// one cycle behind whatever the number of slots; one cycle less and it would miss the sum.
// That last slot goes through two adders in series; the wide one is idle in the other slots.
module gpe #(
    parameter GROUP = 8,
    parameter WIDTH = 8,     // bits of an activation, and digits of a weight
    parameter PSUM = 32,
    parameter INDEX = $clog2(GROUP),
    parameter EXPONENT = $clog2(WIDTH)
) (
    input                         clock,
    input                         reset,
    // Resident activations: while `load` is high they move down one row a cycle.
    input                         load,
    input      [GROUP*WIDTH-1:0]  activations_in,
    output reg [GROUP*WIDTH-1:0]  activations,
    // The term from the left, and one cycle later to the right.
    input                         valid_in,
    input                         sign_in,
    input      [EXPONENT-1:0]     exponent_in,
    input      [INDEX-1:0]        index_in,
    input                         last_in,
    output reg                    valid,
    output reg                    sign,
    output reg [EXPONENT-1:0]     exponent,
    output reg [INDEX-1:0]        index,
    output reg                    last,
    // The partial sum from above (sampled with `last_in`) and to below.
    input      [PSUM-1:0]         psum_in,
    output reg [PSUM-1:0]         psum
);
    // The terms of one NAF weight sum in magnitude to less than 2^WIDTH, whatever their signs, and
    // an activation's is at most 2^(WIDTH-1): a group's running sum fits these bits with its sign.
    localparam SUM = 2 * WIDTH + INDEX;

    reg  signed [SUM-1:0]   sum;
    wire signed [WIDTH-1:0] selected = activations[index_in*WIDTH +: WIDTH];
    wire signed [SUM-1:0]   extended = valid_in ? selected : 0;
    wire        [SUM-1:0]   shifted  = extended << exponent_in;
    // sum -/+ shifted on one adder: the extra low bit carries the +1 of the two's complement in.
    wire        [SUM:0]     carried  = {sum, sign_in} + {shifted ^ {SUM{sign_in}}, sign_in};
    wire signed [SUM-1:0]   next_sum = carried[SUM:1];
    wire signed [PSUM-1:0]  next_sum_wide = next_sum;

    always @(posedge clock) begin
        if (load) activations <= activations_in;
        sum <= reset | last_in ? {SUM{1'b0}} : next_sum;
        if (last_in) psum <= psum_in + next_sum_wide;

        valid    <= valid_in & ~reset;
        last     <= last_in & ~reset;
        sign     <= sign_in;
        exponent <= exponent_in;
        index    <= index_in;
    end
endmodule
